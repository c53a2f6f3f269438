//! Modules depend downwards only.

use std::fs;
use std::path::{Path, PathBuf};

/// Level of each module; a module may name those of lower levels, and itself.
const LEVELS: [(&str, u32); 21] = [
    ("error", 0),
    ("types", 0),
    ("sync", 0),
    ("wait", 0),
    ("memory", 0),
    ("planted", 0),
    ("socket", 0),
    ("format", 1),
    ("storage", 1),
    ("device", 1),
    ("live", 2),
    ("packed", 2),
    ("chain", 3),
    ("serve", 2),
    ("derive", 4),
    ("holder", 4),
    ("inspect", 4),
    ("nbd", 5),
    ("fuse", 5),
    ("store", 5),
    ("control", 6),
];

fn level(module: &str) -> u32 {
    let found = LEVELS.iter().find(|(name, _)| *name == module);
    found.unwrap_or_else(|| panic!("module {module} has no level in tests/engine/layering.rs")).1
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.file_name().is_some_and(|name| name == "tests.rs") {
            // A module's tests may use whatever builds what they test.
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The modules that a source names after `crate::`, braced lists included.
fn named(source: &str) -> Vec<String> {
    let word = |text: &str| {
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>()
    };
    let mut names = Vec::new();
    for rest in source.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(list) => {
                let list = list.split(';').next().unwrap_or("");
                names.extend(list.split(',').map(|item| word(item.trim())));
            }
            None => names.push(word(rest)),
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn modules_depend_downwards_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut seen = 0;
    for file in files {
        let module = file.strip_prefix(&src).unwrap().components().next().unwrap();
        let module = module.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned();
        if module == "lib" {
            continue;
        }
        let source = fs::read_to_string(&file).unwrap();
        for name in named(&source) {
            let (own, other) = (level(&module), level(&name));
            assert!(
                name == module || other < own || (own == 0 && other == 0),
                "{} (level {own}) names {name} (level {other})",
                file.display()
            );
            seen += 1;
        }
    }
    assert!(seen > 50, "the scan found only {seen} uses");
}

/// Front ends: rooms that turn a protocol into calls of disks in use.
const FRONT_ENDS: [&str; 2] = ["nbd", "fuse"];

#[test]
fn a_front_end_names_serve_device_error_and_itself() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for front_end in FRONT_ENDS {
        let mut files = Vec::new();
        sources(&src.join(front_end), &mut files);
        assert!(!files.is_empty(), "{front_end} is gone");
        for file in files {
            for name in named(&fs::read_to_string(&file).unwrap()) {
                let allowed = ["serve", "device", "error", front_end].contains(&name.as_str());
                assert!(allowed, "{} names {name}", file.display());
            }
        }
    }
}

/// The front end that the docs of `serve` show, without its comments and the client that tries it.
#[test]
fn a_front_end_takes_70_lines() {
    let docs = include_str!("../../src/serve/mod.rs");
    let example = docs.split("//! ```\n").nth(1).unwrap();
    let front_end = example.split("//! // A disk, and a client.\n").next().unwrap();
    assert!(front_end.len() < example.len(), "the client has no head");
    let lines = front_end.lines().map(|line| line.trim_start_matches("//!").trim());
    let code = lines.filter(|line| !line.is_empty() && !line.starts_with("//")).count();
    assert!((40..=70).contains(&code), "{code} lines of code");
    for name in named(&front_end.replace("thinply::", "crate::")) {
        assert!(["serve", "device", "error"].contains(&name.as_str()), "names {name}");
    }
}

#[test]
fn the_library_knows_no_command_line_and_no_logger() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let manifest = fs::read_to_string(manifest).unwrap();
    let dependencies =
        manifest.split("[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    for name in ["clap", "indicatif", "env_logger", "tracing-subscriber", "tokio", "serde"] {
        let mut always = dependencies.lines().filter(|line| !line.contains("optional = true"));
        assert!(!always.any(|line| line.contains(name)), "the library depends on {name}");
    }
}

#[test]
fn the_scan_sees_every_form() {
    assert_eq!(named("use crate::live::X;"), ["live"]);
    assert_eq!(named("use crate::{chain::Y, nbd};"), ["chain", "nbd"]);
    assert_eq!(named("let x = crate::nbd::proto::f();"), ["nbd"]);
}
