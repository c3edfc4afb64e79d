//! How many experts tokens use, alone and together: what decides how much of a mixture a step reads.
//!
//! After BlockFFN (arXiv:2507.08771): token-level sparsity is the mean share of experts that a token leaves unused, chunk-level
//! sparsity `CLS_n` the mean share that none of `n` consecutive tokens uses. `CLS_1` is the first, and `CLS_n` does not grow with
//! `n`.

use super::Window;
use crate::{
    engine::Engine,
    error::{Error, Result},
    model::spec::MlpSpec,
};
use lacuna_core::{observer::Observer, site::Point};

/// Lengths of the chunks that are counted.
pub const CHUNKS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Counts the experts that chunks of tokens use, at every layer that has experts.
#[derive(Clone, Debug)]
pub struct ExpertUse {
    layers: Vec<Layer>,
}

#[derive(Clone, Debug, Default)]
struct Layer {
    experts: usize,
    tokens: u64,
    /// One per length of [`CHUNKS`].
    chunks: [Chunk; CHUNKS.len()],
}

#[derive(Clone, Debug, Default)]
struct Chunk {
    /// Experts that the chunk has used so far.
    used: Vec<bool>,
    /// Its tokens so far.
    tokens: usize,
    /// Whole chunks, and the experts that they used.
    whole: u64,
    sum: u64,
}

impl Chunk {
    fn add(&mut self, length: usize, row: &[f32]) {
        self.used.resize(row.len(), false);
        self.used.iter_mut().zip(row).for_each(|(u, v)| *u |= *v != 0.0);
        self.tokens += 1;
        if self.tokens == length {
            self.whole += 1;
            self.sum += self.used.iter().filter(|u| **u).count() as u64;
            self.begin();
        }
    }

    fn begin(&mut self) {
        self.used.fill(false);
        self.tokens = 0;
    }
}

impl ExpertUse {
    /// For a model of `layers` blocks.
    pub fn new(layers: usize) -> Self {
        Self { layers: vec![Layer::default(); layers] }
    }

    /// What comes next does not follow what came before: chunks do not reach across.
    pub fn next_text(&mut self) {
        self.layers.iter_mut().flat_map(|l| &mut l.chunks).for_each(Chunk::begin);
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.layers.iter().map(|l| l.tokens).max().unwrap_or(0)
    }

    /// `CLS_n` of one layer, or over all layers with experts; `None` where no chunk of `CHUNKS[chunk]` tokens was whole.
    pub fn sparsity(&self, chunk: usize, layer: Option<usize>) -> Option<f64> {
        let of = |l: &Layer| {
            let c = l.chunks.get(chunk)?;
            (c.whole > 0).then(|| 1.0 - c.sum as f64 / (c.whole as f64 * l.experts as f64))
        };
        let chosen = |i: usize| layer.is_none_or(|only| only == i);
        let all: Vec<f64> =
            self.layers.iter().enumerate().filter(|(i, _)| chosen(*i)).filter_map(|(_, l)| of(l)).collect();
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    }

    /// Experts of a layer, 0 where it has none.
    pub fn experts(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |l| l.experts)
    }
}

impl Observer for ExpertUse {
    fn wants(&self, point: Point) -> bool {
        matches!(point, Point::Experts { layer } if layer < self.layers.len())
    }

    fn observe(&mut self, point: Point, width: usize, values: &[f32]) {
        let Point::Experts { layer } = point else { return };
        let Some(layer) = self.layers.get_mut(layer) else { return };
        layer.experts = width;
        for row in values.chunks_exact(width) {
            layer.tokens += 1;
            layer.chunks.iter_mut().zip(CHUNKS).for_each(|(c, length)| c.add(length, row));
        }
    }
}

/// Runs the dense model over `windows` and counts the experts that it uses. `progress(done, all)` counts windows.
///
/// # Errors
/// A model without experts; those of [`crate::engine::Session::observe`].
pub fn expert_use(engine: &Engine, windows: &[Window], mut progress: impl FnMut(usize, usize)) -> Result<ExpertUse> {
    let spec = &engine.model().spec;
    let mixture = |m: &MlpSpec| matches!(m, MlpSpec::Experts { .. } | MlpSpec::ReluExperts { .. });
    if !spec.blocks.iter().any(|b| mixture(&b.mlp)) {
        let problem = format!("the architecture `{}` has no experts to count", spec.arch);
        return Err(Error::Argument { name: "model", problem });
    }
    let mut counted = ExpertUse::new(spec.blocks.len());
    let longest = windows.iter().map(|w| w.tokens.len()).max().unwrap_or(0);
    let mut session = engine.session(longest)?;
    for (i, window) in windows.iter().enumerate() {
        session.truncate(0);
        session.observe(&window.tokens, &mut counted)?;
        counted.next_text();
        progress(i + 1, windows.len());
    }
    Ok(counted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_counted_by_their_unions() {
        let point = Point::Experts { layer: 1 };
        let mut used = ExpertUse::new(2);
        assert!(used.wants(point) && !used.wants(Point::Experts { layer: 2 }) && !used.wants(Point::Head));
        // Experts 0; 1; 0 and 1; none, of four.
        let rows = [1.0, 0.0, 0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        used.observe(point, 4, &rows[..4]);
        used.observe(point, 4, &rows[4..]);
        assert_eq!((used.tokens(), used.experts(1), used.experts(0)), (4, 4, 0));
        assert_eq!(used.sparsity(0, None), Some(1.0 - 4.0 / 16.0));
        assert_eq!(used.sparsity(1, Some(1)), Some(1.0 - 4.0 / 8.0));
        assert_eq!(used.sparsity(2, None), Some(0.5));
        assert_eq!((used.sparsity(3, None), used.sparsity(0, Some(0))), (None, None));
        // A chunk does not reach into the next text.
        used.observe(point, 4, &[0.0, 0.0, 0.0, 1.0]);
        used.next_text();
        used.observe(point, 4, &rows[..8]);
        assert_eq!(used.sparsity(1, None), Some(1.0 - 6.0 / 12.0));
    }

    #[test]
    fn sparsity_does_not_grow_with_the_chunk() {
        let mut used = ExpertUse::new(1);
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 60) as f32
        };
        let rows: Vec<f32> = (0..128 * 40).map(|_| if next() > 13.0 { 1.0 } else { 0.0 }).collect();
        used.observe(Point::Experts { layer: 0 }, 40, &rows);
        let all: Vec<f64> = (0..CHUNKS.len()).filter_map(|c| used.sparsity(c, None)).collect();
        assert_eq!(all.len(), CHUNKS.len());
        assert!(all.windows(2).all(|w| w[1] <= w[0]) && all[0] > 0.8 && all[6] < 0.1, "{all:?}");
    }
}
