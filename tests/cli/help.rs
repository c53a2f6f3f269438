//! Help texts, completions and manual pages: the texts are pinned in `help/`.
//! `SNAPSHOTS=overwrite cargo test` writes them anew.

use std::path::Path;

use crate::support::{Folder, VERBS};

/// The verbs under a noun.
const NESTED: [(&str, &[&str]); 4] = [
    ("image", &["import", "build-from", "ls", "history", "tag", "rm", "inspect", "save", "load"]),
    ("container", &["create", "ls", "inspect", "commit", "rm", "reset", "diff", "snapshot"]),
    ("volume", &["create", "ls", "rm", "inspect"]),
    ("store", &["check"]),
];

fn pinned(name: &str, text: String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cli/help").join(name);
    snapbox::Assert::new()
        .action_env("SNAPSHOTS")
        .eq(text, snapbox::Data::read_from(&path, Some(snapbox::data::DataFormat::Text)));
}

#[test]
fn help_is_pinned_and_has_an_example_for_every_verb() {
    let folder = Folder::new();
    pinned("thinply.txt", folder.ok(&["--help"]));
    for verb in VERBS {
        let text = folder.ok(&[verb, "--help"]);
        assert!(text.contains("Example"), "{verb}");
        assert!(text.contains(&format!("  thinply {verb} ")), "{verb}");
        pinned(&format!("{verb}.txt"), text);
    }
}

#[test]
fn help_of_nouns_is_pinned_and_has_an_example_for_every_verb() {
    let folder = Folder::new();
    for (noun, verbs) in NESTED {
        for verb in verbs {
            let text = folder.ok(&[noun, verb, "--help"]);
            assert!(text.contains(&format!("  thinply {noun} {verb}")), "{noun} {verb}");
            pinned(&format!("{noun}-{verb}.txt"), text);
        }
    }
}

#[test]
fn the_help_names_every_verb() {
    let folder = Folder::new();
    let text = folder.ok(&["--help"]);
    let listed = text.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed: Vec<_> = listed
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    assert_eq!(listed, VERBS);
}

#[test]
fn completions_know_the_verbs_in_every_shell() {
    let folder = Folder::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = folder.ok(&["completions", shell]);
        assert!(script.contains("snapshot") && script.contains("layers"), "{shell}");
    }
    assert!(folder.run(&["completions", "csh"]).refused().contains("csh"));
}

#[test]
fn there_is_a_manual_page_for_every_verb() {
    let folder = Folder::new();
    assert_eq!(folder.ok(&["man", "share/man1"]), "");
    for verb in VERBS {
        let page = String::from_utf8(folder.read(&format!("share/man1/thinply-{verb}.1"))).unwrap();
        assert!(page.starts_with(".ie") && page.contains(".SH SYNOPSIS"), "{verb}: {page}");
        assert!(page.contains("Example"), "{verb}");
    }
    assert!(folder.join("share/man1/thinply.1").exists());
    folder.write("file", b"");
    assert!(folder.run(&["man", "file"]).refused().contains("file: "));
}
