//! Tables and times as people know them from Docker.

use std::time::SystemTime;

use crate::io::output::Output;
use crate::io::size::human;
use thinply::error::{Result, shown};

/// Appends rows under a heading, each column as wide as its widest cell. A cell may hold what a
/// terminal takes for a command: texts of images come from anywhere.
pub fn print(output: &mut Output, heading: &[&str], rows: &[Vec<String>]) -> Result<()> {
    let fit = |row: &Vec<String>| row.iter().map(|cell| shown(cell).to_string()).collect();
    let rows: &Vec<Vec<_>> = &rows.iter().map(fit).collect();
    let mut widths: Vec<_> = heading.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
    };
    output.line(line(&heading.iter().map(|&cell| cell.to_owned()).collect::<Vec<_>>()))?;
    rows.iter().try_for_each(|row| output.line(line(row)))
}

/// A size for a table: as short as Docker's.
pub fn short(bytes: u64) -> String {
    human(bytes).trim_start_matches("about ").to_owned()
}

/// The beginning of an id, as long as Docker shows it.
pub fn short_id(id: &str) -> String {
    id.chars().take(12).collect()
}

/// The present time, RFC 3339.
pub fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// How long ago an RFC 3339 time is; the text itself where it is none.
pub fn ago(created: &str) -> String {
    let Ok(then) = humantime::parse_rfc3339_weak(created) else { return created.to_owned() };
    let seconds = SystemTime::now().duration_since(then).map_or(0, |past| past.as_secs());
    format!("{} ago", span(seconds))
}

fn span(seconds: u64) -> String {
    let (minute, hour, day) = (60, 3600, 86400);
    match seconds {
        0 => "Less than a second".into(),
        1 => "1 second".into(),
        s if s < minute => format!("{s} seconds"),
        s if s < 2 * minute => "About a minute".into(),
        s if s < hour => format!("{} minutes", s / minute),
        s if s < 2 * hour => "About an hour".into(),
        s if s < 2 * day => format!("{} hours", s / hour),
        s if s < 14 * day => format!("{} days", s / day),
        s if s < 60 * day => format!("{} weeks", s / (7 * day)),
        s if s < 730 * day => format!("{} months", s / (30 * day)),
        s => format!("{} years", s / (365 * day)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_docker_writes_them() {
        for (seconds, text) in [
            (0, "Less than a second"),
            (59, "59 seconds"),
            (61, "About a minute"),
            (3599, "59 minutes"),
            (3600, "About an hour"),
            (47 * 3600, "47 hours"),
            (3 * 86400, "3 days"),
            (21 * 86400, "3 weeks"),
            (800 * 86400, "2 years"),
        ] {
            assert_eq!(span(seconds), text);
        }
        assert_eq!(ago("no time"), "no time");
        assert!(ago("2020-01-01T00:00:00.5Z").ends_with(" years ago"));
    }
}
