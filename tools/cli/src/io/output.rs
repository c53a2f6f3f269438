//! What goes to standard output: kept until all of it is known, so that a failure prints nothing.

use std::fmt::Display;
use std::io::{self, Seek, Write};

use serde::Serialize;
use serde_json::Value;
use tempfile::SpooledTempFile;
use thinply::error::{Error, Result, is_unfit, shown};

use crate::io::size::human;

/// Beyond this the text waits in a temporary file.
const IN_MEMORY: usize = 8 << 20;

/// Text that is being made.
pub struct Output {
    spool: io::BufWriter<SpooledTempFile>,
}

fn failed(error: io::Error) -> Error {
    Error::io(error, "writing the output")
}

impl Output {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { spool: io::BufWriter::new(SpooledTempFile::new(IN_MEMORY)) }
    }

    /// Appends a line. What others said in it is made fit to be shown.
    pub fn line(&mut self, line: impl Display) -> Result<()> {
        writeln!(self.spool, "{}", shown(&line.to_string())).map_err(failed)
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.spool.write_all(bytes).map_err(failed)
    }

    /// Appends a JSON value on lines of its own.
    pub fn json(&mut self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(|error| failed(error.into()))?;
        writeln!(self.spool, "{}", escaped(&text)).map_err(failed)
    }

    /// Appends the facts of an object as lines for people: the same ones as in JSON, by their
    /// construction. Sizes also come with a unit, facts that are not there are left out.
    pub fn facts(&mut self, value: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(value).map_err(|error| failed(error.into()))?;
        let object = value.as_object().into_iter().flatten();
        for (key, value) in object.filter(|(_, value)| !value.is_null()) {
            self.line(format_args!(
                "{:<31}{}",
                format!("{}:", key.replace('_', " ")),
                plain(key, value)
            ))?;
        }
        Ok(())
    }

    /// Begins a JSON object with the facts of `head` and a list behind them, which goes on with
    /// [`Output::item`] and ends with [`Output::end_list`].
    pub fn begin_list(&mut self, head: &impl Serialize, name: &str) -> Result<List<'_>> {
        let mut text = serde_json::to_string(head).map_err(|error| failed(error.into()))?;
        text.pop();
        write!(self.spool, "{},\"{name}\":[", escaped(&text)).map_err(failed)?;
        Ok(List { output: self, empty: true })
    }

    /// Sends everything to standard output, or as much of it as somebody reads.
    pub fn print(self) -> Result<()> {
        let mut spool = self.spool.into_inner().map_err(|error| failed(error.into_error()))?;
        spool.rewind().map_err(failed)?;
        let mut stdout = io::stdout().lock();
        match io::copy(&mut spool, &mut stdout).and_then(|_| stdout.flush()) {
            // Whoever reads text may have seen enough. Not so with a disk or an archive.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            printed => printed.map_err(failed),
        }
    }
}

/// A JSON list that is being made, an item a line.
pub struct List<'a> {
    output: &'a mut Output,
    empty: bool,
}

impl List<'_> {
    /// Appends an item.
    pub fn item(&mut self, item: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(item).map_err(|error| failed(error.into()))?;
        let comma = if std::mem::take(&mut self.empty) { "" } else { "," };
        write!(self.output.spool, "{comma}\n{}", escaped(&text)).map_err(failed)
    }

    /// Ends the list and its object.
    pub fn end(self) -> Result<()> {
        writeln!(self.output.spool, "\n]}}").map_err(failed)
    }
}

/// JSON without what a terminal obeys. Below the space JSON has escaped it already, and of what is
/// left nothing stands outside of a string.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\n' => text.push(c),
            _ if is_unfit(c) => text += &format!("\\u{:04x}", u32::from(c)),
            _ => text.push(c),
        }
    }
    text
}

fn plain(key: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) if key.ends_with("_size") => match number.as_u64() {
            Some(bytes) if bytes >= 1024 => format!("{} ({bytes} bytes)", human(bytes)),
            _ => format!("{number} bytes"),
        },
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        other => other.to_string(),
    }
}

/// Says something that is no fact and no error: to standard error, where no script reads it.
pub fn say(text: impl Display) {
    super::log::stderr().line(format_args!("thinply: {}", shown(&text.to_string())));
}
