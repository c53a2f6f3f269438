//! `docs/walkthrough.md`: its commands are run, and what they print is compared with the page.
//! `SNAPSHOTS=overwrite cargo test` writes their output into the page.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::store::cost;
use crate::support::{Folder, KIB, output, skip, start};

/// What the page calls the folder in which its commands run.
const HOME: &str = "/home/me";

/// Runs the page's commands like a shell that knows one job.
struct Shell<'a> {
    folder: &'a Folder,
    job: Option<Child>,
}

impl Shell<'_> {
    fn command(&self, line: &str) -> Command {
        let mut command = self.folder.command(&[]);
        let program = PathBuf::from(command.get_program());
        let path = std::env::var("PATH").unwrap();
        let path = format!("{}:{path}:/usr/sbin:/sbin", program.parent().unwrap().display());
        command = Command::new("sh");
        command.arg("-c").arg(line).env("PATH", path).env("LC_ALL", "C");
        command.current_dir(self.folder.path()).env("THINPLY_ROOT", "store");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&mut self, line: &str) -> String {
        if let Some(line) = line.strip_suffix(" &") {
            let mut command = self.command(&format!("exec {line}"));
            let mut job = start(command.stderr(Stdio::inherit()));
            let mut first = String::new();
            BufReader::new(job.stdout.take().unwrap()).read_line(&mut first).unwrap();
            self.job = Some(job);
            return first.replace(&self.folder.path().display().to_string(), HOME);
        }
        if line == "kill %1" {
            let mut job = self.job.take().unwrap();
            let pid = job.id().to_string();
            assert!(Command::new("kill").arg(pid).status().unwrap().success());
            assert!(job.wait().unwrap().success());
            return String::new();
        }
        let answer = self.answer(line);
        if line.starts_with("qemu-io") {
            self.wait_for_hangup(line);
        }
        answer
    }

    fn answer(&self, line: &str) -> String {
        let answer = output(&mut self.command(line));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        text(answer.stdout) + &text(answer.stderr)
    }

    /// The server closes a container a moment after its client has gone.
    fn wait_for_hangup(&self, line: &str) {
        let name = line.split_once("/container/").and_then(|(_, rest)| rest.split_once('?'));
        let Some((name, _)) = name else { return };
        let deadline = Instant::now() + Duration::from_secs(30);
        let look = format!("thinply container diff {name}");
        while self.answer(&look).contains("is being written") && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Shell<'_> {
    fn drop(&mut self) {
        if let Some(job) = &mut self.job {
            let _ = job.kill();
            let _ = job.wait();
        }
    }
}

/// What differs from run to run: ids get letters in the order in which they come, so that equal
/// ones stay equal; times, sizes and padding go.
fn comparable(text: &str) -> String {
    let mut ids = HashMap::new();
    let mut lines = Vec::new();
    for line in text.lines() {
        // The speed that qemu-io tells.
        if line.contains(" ops/sec") {
            continue;
        }
        let words: Vec<_> = line.split_whitespace().collect();
        let words = words.iter().enumerate().map(|(at, word)| {
            let digits = word.trim_start_matches("sha256:");
            let hex = digits.chars().all(|c| c.is_ascii_hexdigit());
            if hex && matches!(digits.len(), 12 | 64) {
                // Removal names blobs in the order of their ids.
                if line.starts_with("Deleted:") {
                    return "id".into();
                }
                let count = b'A' + ids.len() as u8;
                let letter = *ids.entry(digits[..12].to_owned()).or_insert(count);
                return format!("id{}", char::from(letter));
            }
            let unit = words.get(at + 1).map_or("", |unit| unit.trim_matches(['(', ')']));
            if matches!(unit, "bytes" | "KiB" | "MiB") { "N".into() } else { (*word).to_owned() }
        });
        let line = words.collect::<Vec<_>>().join(" ");
        lines.push(without_time(
            &line.replace(" KiB", "").replace(" MiB", "").replace(" bytes", ""),
        ));
    }
    lines.join("\n")
}

fn without_time(line: &str) -> String {
    let Some(end) = line.find(" ago") else { return line.to_owned() };
    let head = line[..end].trim_end_matches(|c: char| c.is_alphanumeric() || c == ' ');
    // The time has two words or more; what stands before it is an id.
    let kept: Vec<_> = line[head.len()..end].split(' ').collect();
    let at = kept
        .iter()
        .position(|word| word.parse::<u64>().is_ok() || matches!(*word, "Less" | "About"));
    let before = kept[..at.unwrap_or(0)].join(" ");
    format!("{head}{before} AGO{}", &line[end + 4..])
}

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/walkthrough.md")
}

fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

#[test]
fn the_walk_prints_what_the_page_says() {
    if !["qemu-io", "nbdinfo", "/usr/sbin/mke2fs"].into_iter().all(has) {
        return skip("needs qemu-io, nbdinfo and mke2fs");
    }
    let folder = Folder::new();
    let mut shell = Shell { folder: &folder, job: None };
    let text = std::fs::read_to_string(page()).unwrap();
    let mut made = String::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        }
        if inside && !line.starts_with("```") {
            let Some(command) = line.strip_prefix("$ ") else { continue };
            made += &format!("{line}\n{}", shell.run(command));
            bounds(&folder, command);
        } else {
            made += &format!("{line}\n");
        }
    }
    if std::env::var_os("SNAPSHOTS").is_some_and(|value| value == "overwrite") {
        std::fs::write(page(), &made).unwrap();
    }
    assert_eq!(comparable(&made), comparable(&text));
}

/// What the page claims of sizes.
fn bounds(folder: &Folder, command: &str) {
    let containers = folder.join("store/containers");
    let each = |prefix: &str| {
        let files = std::fs::read_dir(&containers).unwrap().map(|entry| entry.unwrap());
        let own = files.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
        own.map(|entry| cost(&entry.path())).sum::<u64>()
    };
    if command.starts_with("for n in") {
        for name in ["my_container_2", "my_container_5"] {
            assert!(each(name) <= 16 * KIB, "{name}: {}", each(name));
        }
    }
    if command.contains("write -P 66") {
        assert!((16 * KIB..=48 * KIB).contains(&each("my_container_1")));
        assert!(each("my_container_2") <= 16 * KIB, "a write lands in one container alone");
    }
    if command.contains("acme/my-base-image:1.0") && command.starts_with("thinply image rm") {
        assert_eq!(std::fs::read_dir(&containers).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(folder.join("store/blobs/sha256")).unwrap().count(), 0);
    }
}
