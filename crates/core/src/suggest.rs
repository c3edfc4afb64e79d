//! The nearest valid name, for error messages.

/// The candidate with the smallest edit distance to `name`, if it is near enough to be a likely slip
/// (at most a third of the longer name, but one letter always counts).
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (distance(name, c), c))
        .filter(|&(d, c)| d <= (name.chars().count().max(c.chars().count()) / 3).max(1))
        .min_by_key(|&(d, _)| d)
        .map(|(_, c)| c)
}

/// `; did you mean ...?`, or nothing where no candidate is near.
pub fn hint<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, candidates).map_or(String::new(), |c| format!("; did you mean `{c}`?"))
}

/// Levenshtein distance, with cut-off lengths so that hostile names cost nothing.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_slips_and_leaves_strangers_alone() {
        assert_eq!(nearest("tael", ["relu", "teal"]), None, "two substitutions in four letters is no slip");
        assert_eq!(nearest("tea", ["relu", "teal"]), Some("teal"));
        assert_eq!(nearest("sparcity", ["sparsity", "seed"]), Some("sparsity"));
        assert_eq!(nearest("zzzzzz", ["sparsity", "seed"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
