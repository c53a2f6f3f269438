//! What the pages name is there.

use std::fs;
use std::path::Path;

const PAGES: [&str; 10] = [
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "README.md",
    "docs/bench/README.md",
    "docs/glossary.md",
    "docs/serving.md",
    "docs/store.md",
    "docs/tools.md",
    "docs/walkthrough.md",
    "tests/README.md",
];

/// Whether text in backquotes is a path that should be there: one into a folder of the repository, or
/// of the library as ARCHITECTURE.md names its files.
fn path(text: &str) -> Option<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let (first, _) = text.split_once('/')?;
    let top = ["src", "tools", "tests", "docs", "fuzz", "findings"].contains(&first);
    let inside = text.ends_with(".rs") || text.ends_with(".md");
    (text.chars().all(plain) && (top || inside)).then_some(text)
}

/// What stands in backquotes or as the target of a link.
fn named(page: &str) -> impl Iterator<Item = &str> {
    let quoted = page.lines().flat_map(|line| line.split('`').skip(1).step_by(2)).filter_map(path);
    let links = page.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    quoted.chain(links.filter(|link| !link.contains("://")))
}

#[test]
fn what_the_pages_name_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for page in PAGES {
        let text = fs::read_to_string(root.join(page)).unwrap();
        let beside = root.join(page).parent().unwrap().to_owned();
        let mut seen = 0;
        for name in named(&text) {
            let places = [root.join(name), beside.join(name), root.join("src").join(name)];
            assert!(places.iter().any(|place| place.exists()), "{page} names {name}");
            seen += 1;
        }
        assert!(seen > 0, "{page} names nothing");
    }
}

#[test]
fn every_module_has_its_floor_in_the_architecture() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let floors = page.split("## Floors").nth(1).unwrap().split("## Five walks").next().unwrap();
    for entry in fs::read_dir(root.join("src")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let name = name.trim_end_matches(".rs");
        assert!(name == "lib" || floors.contains(&format!("`{name}`")), "{name} has no floor");
    }
}
