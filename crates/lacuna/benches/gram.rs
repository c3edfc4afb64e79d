//! Rates of Gram matrices as `compress` adds them up.
//!
//! `cargo bench --workspace --bench gram -- [width=4096,14336] [tokens=4096] [threads=1,2] [reps=3]`, best of the repetitions:
//! vectors come in windows of 512 tokens, and
//! all is counted: turning them, products, sums in double precision, the lower triangle. `n^2` multiply-adds per two tokens are
//! needed (one triangle), two operations each. The peak to compare with is what `cargo bench -p lacuna-kernels --bench gemm` prints
//! first (`f32`, of one core).

use lacuna::compress::gram::Gather;
use lacuna_core::{
    observer::Observer,
    site::{Point, Proj},
};
use lacuna_kernels::Pool;
use std::time::Instant;

/// Tokens of a window.
const WINDOW: usize = 512;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let numbers = |name: &str, default: &str| -> Vec<usize> {
        let given = args.iter().find_map(|a| a.strip_prefix(name)?.strip_prefix('='));
        given.unwrap_or(default).split(',').filter_map(|v| v.parse().ok()).collect()
    };
    let windows = numbers("tokens", "4096").first().map_or(1, |n| n.div_ceil(WINDOW));
    let reps = numbers("reps", "3").first().copied().unwrap_or(1);
    let point = Point::Input { layer: 0, proj: Proj::Down };
    for width in numbers("width", "4096,14336") {
        let window: Vec<f32> = (0..WINDOW * width).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect();
        for threads in numbers("threads", "1,2") {
            let pool = Pool::new(threads);
            let mut best = f64::MAX;
            for _ in 0..reps {
                let start = Instant::now();
                let mut gather = Gather::new(&pool, [(point, width)], true);
                (0..windows).for_each(|_| gather.observe(point, width, &window));
                assert!(gather.finish().iter().all(|(_, seen)| seen.gram.is_some()));
                best = best.min(start.elapsed().as_secs_f64());
            }
            let rate = (windows * WINDOW) as f64 * (width as f64).powi(2) * 1e-9 / best;
            println!(
                "{width:6} inputs  {} tokens  {threads} threads: {rate:.0} GFLOP/s ({best:.2} s)",
                windows * WINDOW
            );
        }
    }
}
