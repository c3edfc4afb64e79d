//! Books of pairs: weighted k-means, rounding of the entries to eight bits, and the order in which pairs lie.
//!
//! A vector is a pair of weights with an importance for each; a single weight is a pair whose second number is pinned to
//! zero. Numbers that an earlier step dropped are pinned too: entries have the places of their zeros fixed, and a vector takes
//! only entries that are zero wherever it must be (sheet: "reserve centroid 0 if masks are to be combined", for pairs).

use super::exact;
use lacuna_core::compress::Books;

/// Numbers of a vector that may be other than zero: bit 0 the first, bit 1 the second.
pub type Free = u8;

/// A vector, what its numbers weigh, and which may be other than zero.
#[derive(Clone, Copy, Debug)]
pub struct Vector {
    /// The numbers; pinned ones are zero.
    pub x: [f32; 2],
    /// Importance of each.
    pub h: [f32; 2],
    /// Which are free.
    pub free: Free,
}

/// A book.
#[derive(Clone, Debug, PartialEq)]
pub struct Book {
    /// The numbers of the entries.
    pub entries: Vec<[f32; 2]>,
    /// Which of them are free.
    pub free: Vec<Free>,
}

impl Book {
    /// What finds the entries nearest to many vectors.
    pub fn finder(&self) -> Finder {
        let mut all: Vec<_> = self.entries.iter().zip(&self.free).zip(0..).map(|((c, f), i)| (*c, *f, i)).collect();
        all.sort_by(|a, b| a.0[0].total_cmp(&b.0[0]).then(a.2.cmp(&b.2)));
        Finder { entries: all }
    }

    /// Entries in eight bits, and the exponent of the power of two that they are multiplied by; the book becomes what those
    /// stand for.
    pub fn round(&mut self) -> (Vec<[i8; 2]>, i8) {
        let most = self.entries.iter().flatten().fold(0.0_f32, |m, c| m.max(c.abs()));
        let exponent = if most > 0.0 { (most / 127.0).log2().ceil().clamp(-120.0, 120.0) } else { 0.0 };
        let step = exponent.exp2();
        let code = |c: f32| (c / step).round_ties_even().clamp(-127.0, 127.0) as i8;
        let codes: Vec<[i8; 2]> = self.entries.iter().map(|c| c.map(code)).collect();
        self.entries.iter_mut().zip(&codes).for_each(|(c, q)| *c = q.map(|q| f32::from(q) * step));
        (codes, exponent as i8)
    }
}

/// The entries of a book by their first numbers, so that those far from a vector need not be looked at.
pub struct Finder {
    entries: Vec<([f32; 2], Free, usize)>,
}

impl Finder {
    /// The (at most) `near` entries nearest to a vector, nearest first, of those that are zero where it must be.
    pub fn some_nearest(&self, v: &Vector, near: usize) -> Vec<usize> {
        let able = self.entries.iter().filter(|e| e.1 & !v.free == 0);
        let far = |c: &[f32; 2]| v.h[0] * (v.x[0] - c[0]).powi(2) + v.h[1] * (v.x[1] - c[1]).powi(2);
        let mut all: Vec<(f32, usize)> = able.map(|(c, _, i)| (far(c), *i)).collect();
        let order = |a: &(f32, usize), b: &(f32, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        if all.len() > near {
            all.select_nth_unstable_by(near, order);
            all.truncate(near);
        }
        all.sort_by(order);
        all.into_iter().map(|a| a.1).collect()
    }

    /// The entry nearest to a vector, and how far it is: `min sum h_i (x_i - c_i)^2` over those that are zero where it must be.
    pub fn nearest(&self, v: &Vector) -> (usize, f32) {
        let (mut best, mut least) = (0, f32::INFINITY);
        // One entry; false if all behind it are too far by their first numbers alone.
        let mut look = |(c, free, i): &([f32; 2], Free, usize)| {
            let (a, b) = (v.x[0] - c[0], v.x[1] - c[1]);
            let first = v.h[0] * a * a;
            let d = first + v.h[1] * b * b;
            if free & !v.free == 0 && (d < least || (d == least && *i < best)) {
                (best, least) = (*i, d);
            }
            first <= least
        };
        let (below, above) = self.entries.split_at(self.entries.partition_point(|e| e.0[0] < v.x[0]));
        let (mut below, mut above) = (below.iter().rev(), above.iter());
        // In turns, so that a good one is found early.
        let (mut down, mut up) = (true, true);
        while down || up {
            down = down && below.next().is_some_and(&mut look);
            up = up && above.next().is_some_and(&mut look);
        }
        (best, least)
    }
}

/// A small seeded generator (splitmix64, Steele et al. 2014).
pub struct Draw(pub u64);

impl Draw {
    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The objective stands still.
const STILL: f64 = 1e-4;

/// Weighted k-means into `k` entries. Single numbers without pinned ones among them are clustered exactly ([`exact`]); all else
/// gets k-means++ seeds (with pinned numbers: the exact clusters of the others), then at most `rounds` of Lloyd's. Gives the
/// objective after each assignment, too.
pub fn kmeans(vectors: &[Vector], k: usize, rounds: usize, seed: u64) -> (Book, Vec<f64>) {
    if vectors.iter().any(|v| v.free & 2 != 0) {
        return lloyd(seeds(vectors, k, &mut Draw(seed)), vectors, rounds);
    }
    let mut book = Book { entries: Vec::with_capacity(k), free: Vec::with_capacity(k) };
    let all = shares(vectors, k);
    for (free, count) in &all {
        let own = vectors.iter().filter(|v| v.free == *free).map(|v| (v.x[0], v.h[0]));
        let means = if *free == 0 { vec![0.0; *count] } else { exact::means(own.collect(), *count) };
        book.entries.extend(means.into_iter().map(|m| [m, 0.0]));
        book.free.extend(vec![*free; *count]);
    }
    if all.len() > 1 {
        // Numbers near zero may take the zero of the pinned ones.
        return lloyd(book, vectors, rounds);
    }
    let finder = book.finder();
    let loss = vectors.iter().map(|v| f64::from(finder.nearest(v).1)).sum();
    (book, vec![loss])
}

/// At most `rounds` of Lloyd's from the entries of `book`; an entry without vectors takes over the one that fits worst.
fn lloyd(mut book: Book, vectors: &[Vector], rounds: usize) -> (Book, Vec<f64>) {
    let (mut losses, mut of) = (Vec::new(), vec![0; vectors.len()]);
    let mut lost = vec![0.0_f32; vectors.len()];
    for _ in 0..rounds.max(1) {
        let (mut loss, finder) = (0.0, book.finder());
        for ((v, of), lost) in vectors.iter().zip(&mut of).zip(&mut lost) {
            (*of, *lost) = finder.nearest(v);
            loss += f64::from(*lost);
        }
        let before = losses.last().copied().unwrap_or(f64::INFINITY);
        losses.push(loss);
        if before - loss <= STILL * loss {
            break;
        }
        means(vectors, &of, &mut lost, &mut book);
    }
    (book, losses)
}

/// Every entry becomes the weighted mean of its vectors.
fn means(vectors: &[Vector], of: &[usize], lost: &mut [f32], book: &mut Book) {
    let mut sums = vec![([0.0_f64; 2], [0.0_f64; 2], 0_usize); book.entries.len()];
    for (v, of) in vectors.iter().zip(of) {
        let (hx, h, n) = &mut sums[*of];
        for i in 0..2 {
            hx[i] += f64::from(v.h[i]) * f64::from(v.x[i]);
            h[i] += f64::from(v.h[i]);
        }
        *n += 1;
    }
    for (e, (hx, h, n)) in sums.into_iter().enumerate() {
        if n > 0 {
            for i in (0..2).filter(|i| book.free[e] >> i & 1 == 1 && h[*i] > 0.0) {
                book.entries[e][i] = (hx[i] / h[i]) as f32;
            }
            continue;
        }
        let worst = (0..vectors.len()).filter(|i| vectors[*i].free & book.free[e] == book.free[e]);
        let worst = worst.max_by(|a, b| lost[*a].total_cmp(&lost[*b]).then(b.cmp(a)));
        if let Some(worst) = worst.filter(|w| lost[*w] > 0.0) {
            book.entries[e] = pinned(vectors[worst].x, book.free[e]);
            lost[worst] = 0.0;
        }
    }
}

fn pinned(x: [f32; 2], free: Free) -> [f32; 2] {
    [if free & 1 == 1 { x[0] } else { 0.0 }, if free & 2 == 2 { x[1] } else { 0.0 }]
}

/// k-means++ seeds, drawn for each kind of vector by itself.
fn seeds(vectors: &[Vector], k: usize, draw: &mut Draw) -> Book {
    let mut book = Book { entries: Vec::with_capacity(k), free: Vec::with_capacity(k) };
    for (free, count) in shares(vectors, k) {
        let own: Vec<&Vector> = vectors.iter().filter(|v| v.free == free).collect();
        let mut distance: Vec<f64> = own.iter().map(|v| f64::from(v.h[0] + v.h[1])).collect();
        for first in (0..count).map(|n| n == 0) {
            if own.is_empty() {
                book.entries.push([0.0; 2]);
                book.free.push(free);
                continue;
            }
            let all: f64 = distance.iter().sum();
            let mut at = draw.unit() * all;
            let found = distance.iter().position(|d| {
                at -= d;
                at < 0.0
            });
            let entry = own[found.unwrap_or(0)].x;
            book.entries.push(entry);
            book.free.push(free);
            for (d, v) in distance.iter_mut().zip(&own) {
                let (a, b) = (v.x[0] - entry[0], v.x[1] - entry[1]);
                let new = f64::from(v.h[0] * a * a + v.h[1] * b * b);
                *d = if first { new } else { d.min(new) };
            }
        }
    }
    book
}

/// How many of `k` entries each kind of vector gets: one for pairs of zeros, the others in proportion to the free numbers.
fn shares(vectors: &[Vector], k: usize) -> Vec<(Free, usize)> {
    let count = |free: Free| vectors.iter().filter(|v| v.free == free).count();
    let (none, parts) = (count(0), [3, 1, 2].map(|f: Free| (f, count(f) * f.count_ones() as usize)));
    let mut out: Vec<(Free, usize)> = if none > 0 { vec![(0, 1)] } else { Vec::new() };
    let mut left = k - out.len();
    let mut all: usize = parts.iter().map(|p| p.1).sum();
    let mut kinds = parts.iter().filter(|p| p.1 > 0).count();
    for (free, weight) in parts.into_iter().filter(|p| p.1 > 0) {
        // One at least for each of those behind.
        kinds -= 1;
        let own = ((left * weight) as f64 / all as f64).round() as usize;
        let own = own.clamp(1, left.saturating_sub(kinds).max(1)).min(left);
        out.extend(Some((free, own)).filter(|s| s.1 > 0));
        (left, all) = (left - own, all - weight);
    }
    if left > 0 {
        // Only zeros: the rest is never used.
        match out.last_mut() {
            Some(last) => last.1 += left,
            None => out.push((0, left)),
        }
    }
    out
}

/// The columns of `n` in the order in which pairs follow one another, and for every vector of `size` numbers (2, or 1) how
/// many columns it has: the second of a pair may be missing in a last, shorter block.
pub fn order(n: usize, size: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut columns, mut lengths) = (Vec::with_capacity(n), Vec::new());
    for pair in 0..n.div_ceil(32) * 16 {
        let first = pair / 16 * 32 + pair % 16;
        let both = [first, first + 16].into_iter().filter(|c| *c < n);
        let before = columns.len();
        columns.extend(both);
        match columns.len() - before {
            0 => {}
            n if size == 1 => lengths.extend(std::iter::repeat_n(1, n)),
            n => lengths.push(n),
        }
    }
    (columns, lengths)
}

/// Books of single numbers as books of pairs: every entry with every other.
pub fn product(entries: &[i8]) -> Vec<i8> {
    entries.iter().flat_map(|high| entries.iter().flat_map(move |low| [*low, *high])).collect()
}

/// What books stand for, `[outputs, inputs]`.
pub fn decode(books: &Books, inputs: usize) -> Vec<f32> {
    let (spans, pairs) = (inputs.div_ceil(books.span), inputs.div_ceil(32) * 16);
    let size = 1 << (2 * books.bits);
    let mut out = Vec::with_capacity(books.of_row.len() * inputs);
    for (row, book) in books.of_row.iter().enumerate() {
        for col in 0..inputs {
            let book = usize::from(*book) * spans + col / books.span;
            let code = usize::from(books.codes[row * pairs + col / 32 * 16 + col % 16]);
            let entry = books.entries[(book * size + code) * 2 + col % 32 / 16];
            out.push(f32::from(entry) * f32::from(books.exponents[book]).exp2());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;

    fn vectors(seed: u64, n: usize, free: impl Fn(usize) -> Free) -> Vec<Vector> {
        let (x, h) = (normal(seed, 2 * n), normal(seed + 9, 2 * n));
        let of = |i: usize| Vector {
            x: pinned([x[2 * i], x[2 * i + 1]], free(i)),
            h: [h[2 * i].abs() + 0.1, h[2 * i + 1].abs() + 0.1],
            free: free(i),
        };
        (0..n).map(of).collect()
    }

    #[test]
    fn the_objective_never_rises_and_one_entry_is_the_weighted_mean() {
        let all = vectors(1, 600, |_| 3);
        for k in [1, 2, 7, 16, 64] {
            let (book, losses) = kmeans(&all, k, 50, 3);
            assert!(losses.windows(2).all(|w| w[1] <= w[0] * (1.0 + 1e-6)), "{k}: {losses:?}");
            assert_eq!(book.entries.len(), k);
            if k == 1 {
                for i in 0..2 {
                    let (hx, h) = all.iter().fold((0.0, 0.0), |s, v| (s.0 + v.h[i] * v.x[i], s.1 + v.h[i]));
                    assert!((book.entries[0][i] - hx / h).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn as_many_entries_as_vectors_lose_nothing() {
        let few = vectors(2, 12, |_| 3);
        let many: Vec<Vector> = (0..240).map(|i| few[i % 12]).collect();
        let (_, losses) = kmeans(&many, 16, 50, 1);
        assert!(*losses.last().unwrap() < 1e-9, "{losses:?}");
    }

    #[test]
    fn pairs_beat_the_best_single_numbers_on_normal_weights() {
        // Sheet: two bits in pairs must beat the scalar optimum 0.1175, and cannot beat the rate-distortion bound 0.0625.
        let x = normal(4, 40_000);
        let all: Vec<Vector> = x.as_chunks::<2>().0.iter().map(|x| Vector { x: *x, h: [1.0; 2], free: 3 }).collect();
        let energy: f64 = x.iter().map(|x| f64::from(x * x)).sum();
        let (mut book, _) = kmeans(&all, 16, 100, 5);
        let loss = |book: &Book| {
            let finder = book.finder();
            all.iter().map(|v| f64::from(finder.nearest(v).1)).sum::<f64>()
        };
        let before = loss(&book);
        let share = before / energy;
        assert!((0.0625..0.1175).contains(&share), "{share}");
        // Eight bits for entries cost less than a hundredth of that.
        book.round();
        assert!(loss(&book) < 1.01 * before);
    }

    #[test]
    fn single_numbers_are_clustered_at_least_as_well_as_by_lloyd() {
        for seed in 0..12 {
            let (x, h) = (normal(seed, 700), normal(seed + 50, 700));
            let one = |i: usize| Vector { x: [x[i], 0.0], h: [h[i].abs() + 0.01, 0.0], free: 1 };
            let all: Vec<Vector> = (0..700).map(one).collect();
            for k in [2, 3, 4, 8, 16] {
                let own = *kmeans(&all, k, 1, seed).1.last().unwrap();
                let theirs = *lloyd(seeds(&all, k, &mut Draw(seed)), &all, 100).1.last().unwrap();
                assert!(own <= theirs * (1.0 + 1e-5), "{seed} {k}: {own} {theirs}");
            }
            // With a mask: entries, one of them zero.
            let masked: Vec<Vector> = all
                .iter()
                .enumerate()
                .map(|(i, v)| Vector {
                    x: [if i % 3 == 0 { 0.0 } else { v.x[0] }, 0.0],
                    free: u8::from(i % 3 > 0),
                    ..*v
                })
                .collect();
            let (book, losses) = kmeans(&masked, 8, 50, seed);
            assert!(book.free.contains(&0) && losses.windows(2).all(|w| w[1] <= w[0] * (1.0 + 1e-6)), "{losses:?}");
        }
    }

    #[test]
    fn some_of_the_nearest() {
        let all = vectors(9, 200, |i| (i % 4) as Free);
        let finder = kmeans(&all, 16, 5, 7).0.finder();
        for v in &all {
            let three = finder.some_nearest(v, 3);
            assert_eq!(three[0], finder.nearest(v).0);
            assert!(three.len() <= 3 && (v.free < 3 || three.len() == 3));
        }
    }

    #[test]
    fn the_nearest_entry_is_found() {
        let all = vectors(8, 500, |i| (i % 4) as Free);
        for k in [5, 16, 64] {
            let book = kmeans(&all, k, 5, 7).0;
            let finder = book.finder();
            for v in &all {
                let distance = |c: &[f32; 2]| v.h[0] * (v.x[0] - c[0]).powi(2) + v.h[1] * (v.x[1] - c[1]).powi(2);
                let able = book.entries.iter().zip(&book.free).filter(|(_, f)| *f & !v.free == 0);
                let least = able.map(|(c, _)| distance(c)).fold(f32::INFINITY, f32::min);
                let found = finder.nearest(v).1;
                assert!((found - least).abs() <= 1e-6 * least, "{found} for {least}");
            }
        }
    }

    #[test]
    fn zeros_stay_and_every_kind_has_entries() {
        let all = vectors(6, 800, |i| (i % 4) as Free);
        let (book, _) = kmeans(&all, 16, 30, 2);
        let count = |free: Free| book.free.iter().filter(|f| **f == free).count();
        assert_eq!(count(0), 1);
        assert!(count(1) >= 3 && count(2) >= 3 && count(3) >= 6, "{:?}", book.free);
        for v in &all {
            let (i, _) = book.finder().nearest(v);
            let c = book.entries[i];
            assert!((v.free & 1 == 1 || c[0] == 0.0) && (v.free & 2 == 2 || c[1] == 0.0));
        }
        // A mask of nothing, and one of everything.
        assert_eq!(shares(&vectors(1, 3, |_| 3), 16), [(3, 16)]);
        assert_eq!(shares(&vectors(1, 3, |_| 0), 16), [(0, 16)]);
        assert_eq!(shares(&[], 4), [(0, 4)]);
    }

    #[test]
    fn pairs_are_sixteen_apart() {
        let (columns, lengths) = order(44, 2);
        assert_eq!(columns[..4], [0, 16, 1, 17]);
        assert_eq!((columns[32..].to_vec(), lengths[16..].to_vec()), ((32..44).collect(), vec![1; 12]));
        assert_eq!(order(50, 2).1[16..], [vec![2; 2], vec![1; 14]].concat());
        let mut sorted = order(50, 2).0;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        assert_eq!(order(50, 1).1, vec![1; 50]);
        assert_eq!(product(&[1, 2]), [1, 1, 2, 1, 1, 2, 2, 2]);
    }
}
