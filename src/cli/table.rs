//! Tables for people: columns as wide as what is in them.

/// A head and rows as lines; the last column is not padded. Cells are printable already.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widths = cells.map(|cell| cell.chars().count());
        widths
            .chain(head.get(column).map(|name| name.len()))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..N).map(width).collect();
    let line = |cells: &[&str]| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let rows = rows
        .iter()
        .map(|row| line(&row.each_ref().map(String::as_str)));
    line(&head) + &rows.collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        let rows = [["a", "1", "x y"], ["löng", "22", ""]].map(|row| row.map(str::to_owned));
        let text = table(["NAME", "N", "COMMAND"], &rows);
        assert_eq!(text, "NAME  N   COMMAND\na     1   x y\nlöng  22\n");
        assert_eq!(table(["A", "B"], &[]), "A  B\n");
    }
}
