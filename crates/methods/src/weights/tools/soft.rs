//! Books and codes that are learned together: every vector has a soft choice among its nearest entries, and moves.
//!
//! Vector `v` (which begins as the weights) stands for `q = sum_c p_c c` with `p = softmax(-d(v, c) / tau)` over the entries that
//! were nearest at the start. The loss `tr((W - Q) H (W - Q)^T)` has gradients to the entries (`p_c` makes those far away
//! fade) and to `v`, whose moves change choices; Adam takes steps for both, and `tau` falls until choices are hard.

use super::{
    rows,
    vq::{Book, Vector},
};
use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use lacuna_kernels::Pool;

/// Entries that a vector chooses among.
const NEAR: usize = 3;

/// `tau` at the start and at the end, in units of the mean distance from a vector to its entry.
const TAU: (f32, f32) = (1.0, 0.01);

/// Adam's means of gradients and of their squares.
const BETA: (f32, f32) = (0.9, 0.999);

/// What is learned.
pub struct Problem<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// `W`, its columns in the order of the vectors.
    pub weight: &'a [f32],
    /// `X^T X` in that order, over the largest of its diagonal.
    pub gram: &'a [f32],
    /// First column and columns of every vector.
    pub vectors: &'a [(usize, usize)],
    /// Columns that a book serves.
    pub span: usize,
    /// Which of the books of a span each row uses.
    pub of_row: &'a [u16],
    /// The vector at a place of a row, with its weights and importances.
    pub vector: &'a (dyn Fn(usize, usize) -> Vector + Sync),
}

/// Numbers that Adam moves.
#[derive(Default)]
struct Moved {
    at: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
}

impl Moved {
    fn new(at: Vec<f32>) -> Self {
        let (mean, square) = (vec![0.0; at.len()], vec![0.0; at.len()]);
        Self { at, mean, square }
    }

    /// A step against `gradient` of the number `i`.
    #[inline]
    fn step(&mut self, i: usize, gradient: f32, by: &Step) {
        let (m, s) = (&mut self.mean[i], &mut self.square[i]);
        *m += (1.0 - BETA.0) * (gradient - *m);
        *s += (1.0 - BETA.1) * (gradient * gradient - *s);
        self.at[i] -= by.rate * *m / by.first / ((*s / by.second).sqrt() + 1e-12);
    }
}

/// One step of Adam.
struct Step {
    rate: f32,
    /// What corrects the means, which begin at zero.
    first: f32,
    second: f32,
    /// Share of the way from the soft choices to the hard ones.
    tau: f32,
}

impl Step {
    fn new(number: usize, steps: usize, rate: f32) -> Self {
        let n = number as i32 + 1;
        let way = number as f32 / steps.saturating_sub(1).max(1) as f32;
        let tau = TAU.0 * (TAU.1 / TAU.0).powf(way);
        Self { rate, first: 1.0 - BETA.0.powi(n), second: 1.0 - BETA.1.powi(n), tau }
    }
}

/// The rows that share books.
struct Group {
    rows: Vec<usize>,
    /// `[rows, columns]`.
    vectors: Moved,
    /// `[spans, entries, 2]`.
    entries: Moved,
    free: Vec<u8>,
    /// The entries that each vector chooses among, nearest first; the last is repeated where there are fewer.
    near: Vec<[u16; NEAR]>,
    /// Importances of the columns.
    importance: Vec<f32>,
    /// By span, the mean distance from a vector to its entry.
    spread: Vec<f32>,
    size: usize,
}

/// The soft choice of one vector.
struct Choice {
    p: [f32; NEAR],
    /// What it stands for.
    q: [f32; 2],
    /// The entries.
    c: [[f32; 2]; NEAR],
    h: [f32; 2],
}

impl Group {
    fn new(problem: &Problem<'_>, rows: Vec<usize>, books: &[Book]) -> Self {
        let (n, spans) = (problem.gram.len().isqrt(), books.len());
        let size = books.first().map_or(0, |b| b.entries.len());
        let finders: Vec<_> = books.iter().map(Book::finder).collect();
        let (mut near, mut sums) = (Vec::new(), vec![(0.0_f64, 0.0_f64); spans]);
        for row in &rows {
            for (i, (start, _)) in problem.vectors.iter().enumerate() {
                let (v, span) = ((problem.vector)(*row, i), start / problem.span);
                let some = finders[span].some_nearest(&v, NEAR);
                let last = some.last().copied().unwrap_or(0);
                near.push(std::array::from_fn(|k| some.get(k).copied().unwrap_or(last) as u16));
                let (first, h) = (books[span].entries[some.first().copied().unwrap_or(0)], relative(v.h));
                let d = (0..2).map(|i| f64::from(h[i] * (v.x[i] - first[i]).powi(2))).sum::<f64>();
                sums[span] = (sums[span].0 + d, sums[span].1 + 1.0);
            }
        }
        let one = |v: usize| (problem.vector)(rows.first().copied().unwrap_or(0), v).h;
        let importance = problem.vectors.iter().enumerate().flat_map(|(i, (_, len))| one(i)[..*len].to_vec()).collect();
        let weights = rows.iter().flat_map(|r| &problem.weight[r * n..][..n]).copied().collect();
        Self {
            vectors: Moved::new(weights),
            entries: Moved::new(books.iter().flat_map(|b| b.entries.as_flattened()).copied().collect()),
            free: books.iter().flat_map(|b| &b.free).copied().collect(),
            near,
            importance,
            spread: sums.into_iter().map(|(d, n)| (d / n.max(1.0)) as f32).collect(),
            size,
            rows,
        }
    }

    /// The choice of vector `i` of own row `row`.
    #[inline]
    fn choice(&self, problem: &Problem<'_>, row: usize, i: usize, tau: f32) -> Choice {
        let (start, length) = problem.vectors[i];
        let (n, span) = (self.importance.len(), start / problem.span);
        let v = &self.vectors.at[row * n + start..][..length];
        let mut h = [0.0; 2];
        h[..length].copy_from_slice(&self.importance[start..start + length]);
        let h = relative(h);
        let (mut c, mut d) = ([[0.0; 2]; NEAR], [0.0_f32; NEAR]);
        let near = &self.near[row * problem.vectors.len() + i];
        for (k, entry) in near.iter().enumerate() {
            c[k].copy_from_slice(&self.entries.at[(span * self.size + usize::from(*entry)) * 2..][..2]);
            d[k] = (0..length).map(|j| h[j] * (v[j] - c[k][j]) * (v[j] - c[k][j])).sum();
        }
        let tau = (tau * self.spread[span]).max(f32::MIN_POSITIVE);
        let least = d.iter().copied().fold(f32::INFINITY, f32::min);
        let mut p: [f32; NEAR] = std::array::from_fn(|k| {
            // A repeated entry counts once.
            if k > 0 && near[k] == near[k - 1] { 0.0 } else { (-(d[k] - least) / tau).exp() }
        });
        let sum: f32 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        let q = std::array::from_fn(|j| (0..NEAR).map(|k| p[k] * c[k][j]).sum());
        Choice { p, q, c, h }
    }

    /// What the vectors stand for, `[rows, columns]`.
    fn stand_for(&self, problem: &Problem<'_>, tau: f32, out: &mut [f32]) {
        let n = self.importance.len();
        for row in 0..self.rows.len() {
            for (i, (start, length)) in problem.vectors.iter().enumerate() {
                let q = self.choice(problem, row, i, tau).q;
                out[row * n + start..][..*length].copy_from_slice(&q[..*length]);
            }
        }
    }

    /// One step, by the gradient of the loss to what vectors stand for.
    fn step(&mut self, problem: &Problem<'_>, step: &Step, gradient: &[f32]) {
        let n = self.importance.len();
        let mut sums = vec![0.0_f32; self.entries.at.len()];
        let mut moves = vec![0.0_f32; self.vectors.at.len()];
        for row in 0..self.rows.len() {
            for (i, (start, length)) in problem.vectors.iter().enumerate() {
                let (span, at) = (start / problem.span, row * n + start);
                let own = self.choice(problem, row, i, step.tau);
                let (g, v) = (&gradient[at..][..*length], &self.vectors.at[at..][..*length]);
                let along = |x: &[f32; 2]| g.iter().zip(x).map(|(g, x)| g * x).sum::<f32>();
                let mean = along(&own.q);
                let tau = (step.tau * self.spread[span]).max(f32::MIN_POSITIVE);
                for k in 0..NEAR {
                    // dL/dd_k, and d_k = sum h (v - c)^2.
                    let slope = -own.p[k] * (along(&own.c[k]) - mean) / tau;
                    let entry = (span * self.size + usize::from(self.near[row * problem.vectors.len() + i][k])) * 2;
                    for j in 0..*length {
                        let turn = 2.0 * slope * own.h[j] * (v[j] - own.c[k][j]);
                        sums[entry + j] += own.p[k] * g[j] - turn;
                        moves[at + j] += turn;
                    }
                }
            }
        }
        let entries = &mut self.entries;
        for (i, g) in sums.iter().enumerate().filter(|(i, _)| self.free[i / 2] >> (i % 2) & 1 == 1) {
            entries.step(i, *g, step);
        }
        moves.iter().enumerate().for_each(|(i, g)| self.vectors.step(i, *g, step));
    }

    /// The nearest entry of each vector, and the books.
    fn harden(&self, problem: &Problem<'_>) -> (Vec<u8>, Vec<Book>) {
        let mut codes = Vec::with_capacity(self.near.len());
        for row in 0..self.rows.len() {
            for i in 0..problem.vectors.len() {
                let p = self.choice(problem, row, i, TAU.1).p;
                let best = (0..NEAR).max_by(|a, b| p[*a].total_cmp(&p[*b]).then(b.cmp(a))).unwrap_or(0);
                codes.push(self.near[row * problem.vectors.len() + i][best] as u8);
            }
        }
        let books = self.entries.at.as_chunks::<2>().0.chunks(self.size.max(1)).zip(self.free.chunks(self.size.max(1)));
        (codes, books.map(|(e, f)| Book { entries: e.to_vec(), free: f.to_vec() }).collect())
    }
}

/// Importances over their mean, so that distances of all vectors have one unit.
fn relative(h: [f32; 2]) -> [f32; 2] {
    let (sum, n) = (h[0] + h[1], if h[1] > 0.0 { 2.0 } else { 1.0 });
    if sum > 0.0 { h.map(|h| h * n / sum) } else { [1.0; 2] }
}

/// Learns from `books` (by group of rows, then span) with `steps` steps of `rate` (in units of the root of the mean square of the
/// weights). Gives the entry of every vector, and the books (not rounded).
pub fn learn(problem: &Problem<'_>, books: &[Vec<Book>], steps: usize, rate: f32) -> (Vec<u8>, Vec<Vec<Book>>) {
    let (n, rows) = (problem.gram.len().isqrt(), problem.of_row.len());
    let square: f64 = problem.weight.iter().map(|w| f64::from(*w).powi(2)).sum();
    let unit = (square / problem.weight.len().max(1) as f64).sqrt() as f32;
    let mut groups: Vec<Option<Group>> = books.iter().map(|_| None).collect();
    rows::units(problem.pool, &mut groups, 1, |g, out| {
        let own = (0..rows).filter(|r| usize::from(problem.of_row[*r]) == g).collect();
        *out = Some(Group::new(problem, own, &books[g]));
    });
    let mut groups: Vec<Group> = groups.into_iter().flatten().collect();
    // Rows of a group lie together.
    let order: Vec<usize> = groups.iter().flat_map(|g| &g.rows).copied().collect();
    let weight: Vec<f32> = order.iter().flat_map(|r| &problem.weight[r * n..][..n]).copied().collect();
    let (mut q, mut gradient) = (vec![0.0_f32; rows * n], vec![0.0_f32; rows * n]);
    for number in 0..steps {
        let step = Step::new(number, steps, rate * unit);
        each(problem.pool, &mut groups, &mut q, n, |group, q| group.stand_for(problem, step.tau, q));
        rows::each(problem.pool, &mut q, n, |r, q| q.iter_mut().zip(&weight[r * n..]).for_each(|(q, w)| *q -= w));
        let (d, g) = (MatRef::from_row_major_slice(&q, rows, n), MatRef::from_row_major_slice(problem.gram, n, n));
        matmul(MatMut::from_row_major_slice_mut(&mut gradient, rows, n), Accum::Replace, d, g, 1.0, Par::rayon(0));
        each(problem.pool, &mut groups, &mut gradient, n, |group, g| group.step(problem, &step, g));
    }
    let mut hard: Vec<(Vec<u8>, Vec<Book>)> = groups.iter().map(|_| (Vec::new(), Vec::new())).collect();
    rows::units(problem.pool, &mut hard, 1, |i, out| *out = groups[i].harden(problem));
    let per_row = problem.vectors.len();
    let mut codes = vec![0; rows * per_row];
    let of_rows = hard.iter().flat_map(|h| h.0.chunks_exact(per_row.max(1)));
    order.iter().zip(of_rows).for_each(|(r, own)| codes[r * per_row..][..per_row].copy_from_slice(own));
    (codes, hard.into_iter().map(|h| h.1).collect())
}

/// Runs `f` on every group and its part of `matrix`.
fn each(pool: &Pool, groups: &mut [Group], matrix: &mut [f32], n: usize, f: impl Fn(&mut Group, &mut [f32]) + Sync) {
    let (mut rest, mut work) = (matrix, Vec::with_capacity(groups.len()));
    for group in groups {
        let (own, behind) = rest.split_at_mut(group.rows.len() * n);
        work.push((group, own));
        rest = behind;
    }
    rows::units(pool, &mut work, 1, |_, (group, own)| f(group, own));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{testing::normal, weights::tools::vq};

    fn vector(w: &[f32], n: usize, row: usize, i: usize) -> Vector {
        let at = row * n + 2 * i;
        Vector { x: [w[at], w[at + 1]], h: [1.0, 2.0], free: 3 }
    }

    /// Weights, their Gram matrix, vectors, books.
    type Case = (Vec<f32>, Vec<f32>, Vec<(usize, usize)>, Vec<Vec<Book>>);

    /// A small problem: 4 rows of 6 columns in two groups, a Gram matrix that ties columns together.
    fn case() -> Case {
        let (w, x) = (normal(1, 24), normal(2, 60));
        let mut gram = vec![0.0; 36];
        for row in x.chunks_exact(6) {
            (0..36).for_each(|i| gram[i] += row[i / 6] * row[i % 6] / 10.0);
        }
        let vectors = (0..3).map(|i| (2 * i, 2)).collect();
        let book = |g: usize| {
            let all: Vec<Vector> = (0..6).map(|i| vector(&w, 6, 2 * g + i / 3, i % 3)).collect();
            vec![vq::kmeans(&all, 4, 20, 3).0]
        };
        let books = vec![book(0), book(1)];
        (w, gram, vectors, books)
    }

    fn with<T>(f: impl FnOnce(&Problem<'_>, &[Vec<Book>]) -> T) -> T {
        let (w, gram, vectors, books) = case();
        let pool = Pool::new(2);
        let of = |row: usize, i: usize| vector(&w, 6, row, i);
        let problem = Problem {
            pool: &pool,
            weight: &w,
            gram: &gram,
            vectors: &vectors,
            span: 128,
            of_row: &[0, 0, 1, 1],
            vector: &of,
        };
        f(&problem, &books)
    }

    fn loss(problem: &Problem<'_>, groups: &[Group], tau: f32) -> f64 {
        let mut lost = 0.0;
        for group in groups {
            let mut q = vec![0.0; group.rows.len() * 6];
            group.stand_for(problem, tau, &mut q);
            for (row, q) in group.rows.iter().zip(q.chunks_exact(6)) {
                let d: Vec<f64> = q.iter().zip(&problem.weight[row * 6..]).map(|(q, w)| f64::from(q - w)).collect();
                lost += (0..36).map(|i| d[i / 6] * f64::from(problem.gram[i]) * d[i % 6]).sum::<f64>();
            }
        }
        lost
    }

    #[test]
    fn gradients_are_those_of_differences() {
        with(|problem, books| {
            let make =
                || -> Vec<Group> { (0..2).map(|g| Group::new(problem, vec![2 * g, 2 * g + 1], &books[g])).collect() };
            let tau = 0.7;
            let mut group = make().remove(1);
            let mut q = vec![0.0; 12];
            group.stand_for(problem, tau, &mut q);
            // dL/dQ = 2 (Q - W) H.
            let mut gradient = vec![0.0; 12];
            for (i, g) in gradient.iter_mut().enumerate() {
                let d = |j: usize| q[i / 6 * 6 + j] - problem.weight[(2 + i / 6) * 6 + j];
                *g = (0..6).map(|j| 2.0 * d(j) * problem.gram[j * 6 + i % 6]).sum();
            }
            // Adam's mean after its first step is a tenth of the gradient.
            group.step(problem, &Step { rate: 0.0, first: 1.0, second: 1.0, tau }, &gradient);
            let differs = |change: &dyn Fn(&mut Group, f32)| {
                let at = |h: f32| {
                    let mut groups = make();
                    change(&mut groups[1], h);
                    loss(problem, &groups, tau)
                };
                (at(2e-3) - at(-2e-3)) / 4e-3
            };
            for i in 0..8 {
                let want = differs(&|g, h| g.entries.at[i] += h);
                let got = f64::from(group.entries.mean[i]) * 10.0;
                assert!((got - want).abs() < 2e-2 * (1.0 + want.abs()), "entry {i}: {got} {want}");
            }
            for i in 0..12 {
                let want = differs(&|g, h| g.vectors.at[i] += h);
                let got = f64::from(group.vectors.mean[i]) * 10.0;
                assert!((got - want).abs() < 2e-2 * (1.0 + want.abs()), "vector {i}: {got} {want}");
            }
        });
    }

    #[test]
    fn choices_become_the_nearest_entry() {
        with(|problem, books| {
            let group = Group::new(problem, vec![0, 1], &books[0]);
            let (codes, same) = group.harden(problem);
            assert_eq!(same, books[0]);
            let mut q = vec![0.0; 12];
            group.stand_for(problem, 1e-4, &mut q);
            for i in 0..6 {
                let nearest = books[0][0].finder().nearest(&(problem.vector)(i / 3, i % 3)).0;
                assert_eq!(usize::from(codes[i]), nearest);
                let far = (0..2).map(|j| (q[2 * i + j] - books[0][0].entries[nearest][j]).abs()).fold(0.0, f32::max);
                assert!(far < 1e-5, "{i}: {far}");
            }
        });
    }

    #[test]
    fn nothing_moves_without_steps_and_the_loss_falls_with_them() {
        with(|problem, books| {
            let (codes, same) = learn(problem, books, 0, 1e-3);
            assert_eq!(same, books);
            let hard = |codes: &[u8], books: &[Vec<Book>]| {
                let at = |r: usize, j: usize| {
                    books[usize::from(problem.of_row[r])][0].entries[usize::from(codes[r * 3 + j / 2])][j % 2]
                };
                let d: Vec<f64> = (0..24).map(|i| f64::from(at(i / 6, i % 6) - problem.weight[i])).collect();
                let row = |d: &[f64]| (0..36).map(|i| d[i / 6] * f64::from(problem.gram[i]) * d[i % 6]).sum::<f64>();
                d.chunks_exact(6).map(row).sum::<f64>()
            };
            let before = hard(&codes, &same);
            let (codes, books) = learn(problem, books, 500, 3e-3);
            let after = hard(&codes, &books);
            assert!(after < 0.9 * before, "{before} to {after}");
        });
    }
}
