//! Tables: Markdown with padded columns, which reads well in a terminal and pastes into an issue.

use std::fmt;

/// Rows under a header; columns of numbers are aligned to the right.
pub struct Table {
    header: Vec<String>,
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns; a name that ends in `:` makes a column of numbers.
    pub fn new(columns: &[&str]) -> Self {
        let header = columns.iter().map(|c| c.trim_end_matches(':').to_owned()).collect();
        Self { header, right: columns.iter().map(|c| c.ends_with(':')).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells stay empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|c| c.replace('|', "\\|")).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |i: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(i)).chain([&self.header[i]]);
            cells.map(|c| c.chars().count()).max().unwrap_or(0).max(3)
        };
        let widths: Vec<_> = (0..self.header.len()).map(width).collect();
        let line = |f: &mut fmt::Formatter<'_>, cells: &[String]| {
            for (i, &w) in widths.iter().enumerate() {
                let cell = cells.get(i).map_or("", String::as_str);
                if self.right[i] { write!(f, "| {cell:>w$} ")? } else { write!(f, "| {cell:<w$} ")? }
            }
            writeln!(f, "|")
        };
        line(f, &self.header)?;
        for (i, &w) in widths.iter().enumerate() {
            write!(f, "|{}{}", "-".repeat(w + 1), if self.right[i] { ":" } else { "-" })?;
        }
        writeln!(f, "|")?;
        self.rows.iter().try_for_each(|r| line(f, r))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut t = Table::new(&["name", "t/s:"]);
        t.row(["a|b".to_owned(), "12.5".to_owned()]);
        t.row(["long name".to_owned(), "3".to_owned()]);
        let want = "| name      |  t/s |\n|-----------|-----:|\n| a\\|b      | 12.5 |\n| long name |    3 |\n";
        assert_eq!(t.to_string(), want);
    }
}
