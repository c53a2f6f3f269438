//! `--root` and `--layers`, before the verb and behind it, and the variables in their place.

use crate::support::{Folder, Run, output};

#[test]
fn the_store_is_named_before_the_verb_or_behind_it() {
    let folder = Folder::new();
    folder.ok(&["volume", "create", "--root", "one", "--size", "1M", "v"]);
    folder.ok(&["--root", "two", "volume", "create", "--size", "1M", "w"]);
    let shown = |args: &[&str]| {
        let volumes = folder.json(&[args, &["--json"]].concat());
        volumes[0]["name"].as_str().unwrap().to_owned()
    };
    for (root, volume) in [("one", "v"), ("two", "w")] {
        let joined = format!("--root={root}");
        assert_eq!(shown(&["--root", root, "volume", "ls"]), volume);
        assert_eq!(shown(&["volume", "--root", root, "ls"]), volume);
        assert_eq!(shown(&["volume", "ls", "--root", root]), volume);
        assert_eq!(shown(&[&joined, "volume", "ls"]), volume);
        let mut command = folder.command(&["volume", "ls", "--json"]);
        let run: Run = output(command.env("THINPLY_ROOT", folder.join(root))).into();
        assert!(run.stdout.contains(&format!("\"{volume}\"")));
        // The option is stronger.
        let mut command = folder.command(&["--root", "two", "volume", "ls", "--json"]);
        let run: Run = output(command.env("THINPLY_ROOT", folder.join(root))).into();
        assert!(run.stdout.contains("\"w\""));
    }
    let twice = folder.run(&["--root", "one", "volume", "ls", "--root", "two"]);
    assert!(twice.refused().contains("--root <DIR>' cannot be used multiple times"), "{twice:?}");
}

#[test]
fn parents_are_looked_for_where_it_says_before_the_verb_or_behind_it() {
    let folder = Folder::new();
    std::fs::create_dir(folder.join("parents")).unwrap();
    std::fs::create_dir(folder.join("empty")).unwrap();
    folder.ok(&["create", "--size", "1M", "parents/base.tply"]);
    folder.ok(&["--layers", "parents", "create", "--parent", "parents/base.tply", "a.tply"]);
    assert!(folder.run(&["info", "--chain", "a.tply"]).refused().contains("base.tply"));
    for args in [
        &["--layers", "parents", "info", "--chain", "a.tply"][..],
        &["info", "--layers", "parents", "--chain", "a.tply"],
        &["info", "--chain", "a.tply", "--layers=parents"],
        &["--layers=empty", "info", "--chain", "a.tply", "--layers", "parents"],
        &["--layers=empty", "--layers", "parents", "info", "--chain", "a.tply"],
    ] {
        assert!(folder.ok(args).contains("base.tply"), "{args:?}");
    }
    let mut command = folder.command(&["--layers", "empty", "info", "--chain", "a.tply"]);
    let run: Run = output(command.env("THINPLY_LAYERS", folder.join("parents"))).into();
    assert_eq!(run.code, 0, "{run:?}");
}

#[test]
fn a_verb_that_knows_no_such_option_refuses_it_in_both_places() {
    let folder = Folder::new();
    folder.ok(&["create", "--size", "1M", "a.tply"]);
    for option in ["--root", "--root=x"] {
        let extra: Vec<_> =
            [option].into_iter().chain((!option.contains('=')).then_some("x")).collect();
        for args in
            [[&extra[..], &["info", "a.tply"]].concat(), [&["info", "a.tply"], &extra[..]].concat()]
        {
            let run = folder.run(&args);
            let message = run.refused();
            assert!(message.contains("unexpected argument '--root'"), "{args:?}: {message}");
            assert!(message.contains("Usage: thinply info"), "{args:?}: {message}");
        }
    }
    assert!(folder.run(&["--layers", "x", "volume", "ls"]).refused().contains("'--layers'"));
    assert!(folder.run(&["--root"]).refused().contains("--root <DIR>"));
    assert_eq!(folder.names(), ["a.tply"]);
}
