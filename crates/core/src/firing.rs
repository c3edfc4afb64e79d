//! Which neurons are active, how often, and which of them together.
//!
//! Every token counts in the frequencies (what PowerInfer, arXiv:2312.12456, calls a neuron's hotness); of sampled tokens the
//! whole pattern is kept, a bit per neuron, so that any pair can be asked for afterwards. Memory is `width * (8 + most / 8)`
//! bytes whatever the length of the text, and two records of parts of a text merge to that of the whole.

/// A record of activity at one point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firing {
    width: usize,
    tokens: u64,
    counts: Vec<u64>,
    /// Rows of sampled tokens, each of whole words.
    bits: Vec<u64>,
}

/// Which tokens are sampled: every `every`-th, counted over the whole text, at most `most` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Distance between two sampled tokens, at least 1.
    pub every: u64,
    /// Tokens kept.
    pub most: usize,
}

/// Least number of sampled tokens at which a neuron must have been active to be compared with others.
const LEAST: u32 = 16;

impl Firing {
    /// Adds rows of `width` numbers; those that are not zero are active. `first`: the number of the first row's token in the
    /// text.
    pub fn add(&mut self, width: usize, values: &[f32], first: u64, sampling: Sampling) {
        if width == 0 {
            return;
        }
        self.width = width;
        self.counts.resize(width, 0);
        for (row, token) in values.chunks_exact(width).zip(first..) {
            self.tokens += 1;
            self.counts.iter_mut().zip(row).for_each(|(c, v)| *c += u64::from(*v != 0.0));
            if token.is_multiple_of(sampling.every.max(1)) && self.sampled() < sampling.most {
                let word = |part: &[f32]| part.iter().rev().fold(0u64, |w, v| w << 1 | u64::from(*v != 0.0));
                self.bits.extend(row.chunks(64).map(word));
            }
        }
    }

    /// Adds the record of what follows in the text, which must have been sampled alike.
    pub fn merge(&mut self, next: &Self, sampling: Sampling) {
        if self.width == 0 {
            self.width = next.width;
        }
        if next.width != self.width {
            return;
        }
        self.tokens += next.tokens;
        self.counts.resize(self.width, 0);
        self.counts.iter_mut().zip(&next.counts).for_each(|(a, b)| *a += b);
        let room = sampling.most.saturating_sub(self.sampled()) * self.words();
        self.bits.extend(next.bits.iter().take(room));
    }

    /// Its parts for storing: the width, tokens, counts and bits.
    pub fn parts(&self) -> (usize, u64, &[u64], &[u64]) {
        (self.width, self.tokens, &self.counts, &self.bits)
    }

    /// From [`Firing::parts`]; `None` if they do not belong together.
    pub fn from_parts(width: usize, tokens: u64, counts: Vec<u64>, bits: Vec<u64>) -> Option<Self> {
        let words = width.div_ceil(64);
        let whole = if words == 0 { bits.is_empty() } else { bits.len().is_multiple_of(words) };
        let fits = counts.len() == width && whole && counts.iter().all(|c| *c <= tokens);
        fits.then_some(Self { width, tokens, counts, bits })
    }

    fn words(&self) -> usize {
        self.width.div_ceil(64)
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Tokens whose pattern is kept.
    pub fn sampled(&self) -> usize {
        self.bits.len().checked_div(self.words()).unwrap_or(0)
    }

    /// Tokens at which each neuron was active.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Neurons by how often they were active, most often first; the lower number on ties.
    pub fn by_frequency(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.width).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(self.counts[i]), i));
        order
    }

    /// The least share of the neurons that makes `part` of all activity: the hot ones.
    pub fn hot_share(&self, part: f64) -> f64 {
        let all: u64 = self.counts.iter().sum();
        let (mut sum, mut hot) = (0, 0);
        for i in self.by_frequency() {
            if sum as f64 >= part * all as f64 {
                break;
            }
            sum += self.counts[i];
            hot += 1;
        }
        hot as f64 / self.width.max(1) as f64
    }

    /// The sampled tokens at which neuron `i` was active, a bit per token.
    fn column(&self, i: usize) -> Vec<u64> {
        let mut column = vec![0u64; self.sampled().div_ceil(64)];
        for (t, row) in self.bits.chunks_exact(self.words().max(1)).enumerate() {
            column[t / 64] |= (row[i / 64] >> (i % 64) & 1) << (t % 64);
        }
        column
    }

    /// Groups among the `hottest` neurons whose members are linked by pairs that fire together: of the sampled tokens at which
    /// one of the two is active, both are at `overlap` or more (Jaccard). Groups of two at least, largest first; neurons that are
    /// active at nine of ten tokens would be in one group by chance, and are left out, as are those that are hardly ever.
    pub fn groups(&self, hottest: usize, overlap: f64) -> Vec<Vec<usize>> {
        let most = self.sampled() as f64 * 0.9;
        let count = |column: &[u64]| column.iter().map(|w| w.count_ones()).sum::<u32>();
        let all = self.by_frequency().into_iter().take(hottest).map(|i| (i, self.column(i)));
        let columns: Vec<(usize, Vec<u64>)> =
            all.filter(|(_, c)| count(c) >= LEAST && f64::from(count(c)) < most).collect();
        let mut group: Vec<usize> = (0..columns.len()).collect();
        for a in 0..columns.len() {
            for b in a + 1..columns.len() {
                let pairs = || columns[a].1.iter().zip(&columns[b].1);
                let both: u32 = pairs().map(|(x, y)| (x & y).count_ones()).sum();
                let one: u32 = pairs().map(|(x, y)| (x | y).count_ones()).sum();
                if f64::from(both) >= overlap * f64::from(one) && group[a] != group[b] {
                    let (from, to) = (group[b], group[a]);
                    group.iter_mut().filter(|g| **g == from).for_each(|g| *g = to);
                }
            }
        }
        let mut found: std::collections::BTreeMap<usize, Vec<usize>> = std::collections::BTreeMap::new();
        group.iter().zip(&columns).for_each(|(g, (i, _))| found.entry(*g).or_default().push(*i));
        let mut groups: Vec<Vec<usize>> = found.into_values().filter(|g| g.len() > 1).collect();
        groups.iter_mut().for_each(|g| g.sort_unstable());
        groups.sort_by_key(|g| (std::cmp::Reverse(g.len()), g[0]));
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(tokens: usize, width: usize, mut active: impl FnMut(usize, usize) -> bool) -> Vec<f32> {
        (0..tokens * width).map(|k| if active(k / width, k % width) { 0.5 } else { 0.0 }).collect()
    }

    #[test]
    fn merged_parts_are_the_record_of_one_pass() {
        let (width, tokens) = (70, 101);
        let values = rows(tokens, width, |t, i| (t * 7 + i * 13) % 5 == 0 || i == 69);
        for sampling in
            [Sampling { every: 1, most: 1000 }, Sampling { every: 3, most: 1000 }, Sampling { every: 4, most: 9 }]
        {
            let mut whole = Firing::default();
            whole.add(width, &values, 0, sampling);
            for cuts in [vec![0, 101], vec![0, 1, 101], vec![0, 17, 40, 41, 101]] {
                let mut merged = Firing::default();
                for part in cuts.windows(2) {
                    let mut next = Firing::default();
                    next.add(width, &values[part[0] * width..part[1] * width], part[0] as u64, sampling);
                    merged.merge(&next, sampling);
                }
                assert_eq!(merged, whole, "{sampling:?} {cuts:?}");
            }
            let active = values.iter().filter(|v| **v != 0.0).count() as u64;
            assert_eq!(whole.counts().iter().sum::<u64>(), active, "counts are exact whatever is sampled");
            assert_eq!(whole.counts()[69], 101);
            assert_eq!(whole.sampled(), tokens.div_ceil(sampling.every as usize).min(sampling.most));
        }
    }

    #[test]
    fn hot_neurons_and_groups_are_found() {
        // 0 always; 1, 2 and 3 at every fourth token; 4 and 5 at others of their own; 6 at half of those of 4; 7 never.
        let active = |t: usize, i: usize| match i {
            0 => true,
            1..=3 => t.is_multiple_of(4),
            4 => t % 4 == 1,
            5 => t % 4 == 2,
            6 => t % 8 == 1,
            _ => false,
        };
        let mut firing = Firing::default();
        firing.add(8, &rows(400, 8, active), 0, Sampling { every: 1, most: 400 });
        assert_eq!(firing.groups(8, 0.9), [vec![1, 2, 3]]);
        assert_eq!(firing.groups(8, 0.5), [vec![1, 2, 3], vec![4, 6]]);
        assert_eq!(firing.groups(2, 0.5), Vec::<Vec<usize>>::new(), "only the hottest are looked at");
        assert_eq!(firing.by_frequency()[0], 0);
        // 400 of 950 by one of eight, 500 by two.
        assert_eq!(firing.hot_share(0.4), 0.125);
        assert_eq!(firing.hot_share(0.5), 0.25);
        assert_eq!(firing.hot_share(1.0), 7.0 / 8.0);
        assert_eq!(Firing::default().hot_share(0.5), 0.0);
    }

    #[test]
    fn parts_must_belong_together() {
        let mut firing = Firing::default();
        firing.add(3, &[1.0, 0.0, 0.0, 0.0, 2.0, 0.0], 0, Sampling { every: 1, most: 5 });
        let (width, tokens, counts, bits) = firing.parts();
        assert_eq!((width, tokens, counts, bits), (3, 2, &[1, 1, 0][..], &[1, 2][..]));
        assert_eq!(Firing::from_parts(width, tokens, counts.to_vec(), bits.to_vec()), Some(firing.clone()));
        assert_eq!(Firing::from_parts(2, tokens, counts.to_vec(), bits.to_vec()), None);
        assert_eq!(Firing::from_parts(width, 0, counts.to_vec(), bits.to_vec()), None);
        assert_eq!(Firing::from_parts(0, 0, vec![], vec![1]), None);
    }
}
