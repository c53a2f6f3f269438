//! The command's modules depend downwards only, and those of one room not in circles.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Level of each room; a module may name rooms of lower levels, and modules of its own room.
const LEVELS: [(&str, u32); 9] = [
    ("io", 0),
    ("options", 1),
    ("derive", 2),
    ("import", 2),
    ("mounting", 2),
    ("helper", 3),
    ("verbs", 3),
    ("cli", 4),
    ("main", 5),
];

fn level(room: &str) -> u32 {
    let found = LEVELS.iter().find(|(name, _)| *name == room);
    found.unwrap_or_else(|| panic!("{room} has no level in tests/cli/layering.rs")).1
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Room and module of a source file, as in `verbs` and `image` for `verbs/image/show.rs`. The
/// module of a room's own file has no name.
fn place(file: &Path) -> (String, String) {
    let names: Vec<_> = file
        .components()
        .map(|part| part.as_os_str().to_str().unwrap().trim_end_matches(".rs"))
        .collect();
    let module = names.get(1).filter(|name| **name != "mod");
    (names[0].into(), module.copied().unwrap_or_default().into())
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Room and module of everything that a source of `room` names by a path from `crate`, or from
/// `super` where that is the room. What begins with a capital is no module.
fn named(source: &str, room: &str) -> Vec<(String, String)> {
    let module = |path: &str| Some(word(path)).filter(|name| name.starts_with(char::is_lowercase));
    let items = |path: &str| match path.strip_prefix('{') {
        Some(list) => list
            .split(['}', ';'])
            .next()
            .unwrap_or("")
            .split(',')
            .map(str::trim)
            .map(str::to_owned)
            .collect(),
        None => vec![path.to_owned()],
    };
    let mut found = Vec::new();
    for path in source.split("crate::").skip(1).flat_map(items) {
        let Some(room) = module(&path) else { continue };
        let rest = path[room.len()..].strip_prefix("::").unwrap_or("");
        for item in items(rest) {
            found.push((room.clone(), module(&item).unwrap_or_default()));
        }
    }
    for path in source.split("super::").skip(1).flat_map(items) {
        found.extend(module(&path).map(|name| (room.to_owned(), name)));
    }
    found
}

/// A way from `module` back to itself.
fn circle<'a>(
    uses: &'a BTreeMap<String, BTreeSet<String>>,
    module: &'a str,
    way: &mut Vec<&'a str>,
    done: &mut BTreeSet<&'a str>,
) -> bool {
    if way.contains(&module) {
        way.push(module);
        return true;
    }
    if done.contains(module) {
        return false;
    }
    way.push(module);
    if uses.get(module).into_iter().flatten().any(|next| circle(uses, next, way, done)) {
        return true;
    }
    way.pop();
    done.insert(module);
    false
}

#[test]
fn modules_depend_downwards_only_and_not_in_circles() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut uses: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    let mut seen = 0;
    for file in files {
        let (room, module) = place(file.strip_prefix(&src).unwrap());
        let source = fs::read_to_string(&file).unwrap();
        // Below its module a file's `super` is no longer the room.
        let depth = file.strip_prefix(&src).unwrap().components().count();
        let source = if depth == 2 { source } else { source.replace("super::", "") };
        for (other, name) in named(&source, &room) {
            let (own, its) = (level(&room), level(&other));
            assert!(
                other == room || its < own,
                "{} (level {own}) names {other} (level {its})",
                file.display()
            );
            if other == room && name != module {
                let uses = uses.entry(room.clone()).or_default();
                uses.entry(module.clone()).or_default().insert(name);
            }
            seen += 1;
        }
    }
    assert!(seen > 200, "the scan found only {seen} uses");
    for (room, uses) in &uses {
        for module in uses.keys() {
            let mut way = Vec::new();
            let found = circle(uses, module, &mut way, &mut BTreeSet::new());
            assert!(!found, "{room}: a circle of imports: {}", way.join(" -> "));
        }
    }
}

#[test]
fn the_scan_sees_every_form() {
    let of = |source, room| {
        let named = named(source, room);
        named.into_iter().map(|(room, module)| format!("{room}/{module}")).collect::<Vec<_>>()
    };
    assert_eq!(of("use crate::io::size::human;", "io"), ["io/size"]);
    assert_eq!(of("use crate::io::{pump, size};", "io"), ["io/pump", "io/size"]);
    assert_eq!(of("use crate::verbs::{Answer, Outcome};", "verbs"), ["verbs/", "verbs/"]);
    assert_eq!(
        of("use super::{Disk, raw}; super::sink::put()", "import"),
        ["import/raw", "import/sink"]
    );
    let text = [("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")];
    let uses = text.map(|(from, to)| (from.to_owned(), [to.to_owned()].into())).into();
    let mut way = Vec::new();
    assert!(circle(&uses, "d", &mut way, &mut BTreeSet::new()));
    assert_eq!(way, ["d", "a", "b", "c", "a"]);
}
