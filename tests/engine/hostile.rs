//! Every bad input and fault that thinply must survive, and the tests that show it. This test checks
//! that they exist, so that the list can be read from top to bottom.

use std::fs;
use std::path::Path;

const IMAGE: &[(&str, &[&str])] = &[
    (
        "huge header or extension length",
        &["engine/hostile_image.rs huge_header_and_extension_lengths"],
    ),
    ("shifts and sizes that overflow", &["engine/hostile_image.rs shifts_and_sizes_that_overflow"]),
    (
        "a tiny file that claims a petabyte",
        &[
            "engine/hostile_image.rs a_tiny_file_that_claims_a_petabyte",
            "engine/hostile_image.rs a_sparse_file_of_terabytes_takes_little_memory",
        ],
    ),
    (
        "tables past the end or unaligned",
        &["engine/hostile_image.rs tables_past_the_end_or_unaligned"],
    ),
    ("unknown incompatible feature", &["engine/hostile_image.rs an_unknown_incompatible_feature"]),
    (
        "hint with .., a separator, an absolute path, a URL, json:",
        &["engine/hostile_image.rs hints_that_are_no_plain_names"],
    ),
    (
        "a symlink where a parent should be",
        &["engine/hostile_image.rs a_symlink_where_a_parent_should_be"],
    ),
    ("parent cycle", &["engine/hostile_image.rs a_parent_cycle"]),
    ("depth 10,000", &["engine/hostile_image.rs a_chain_that_is_too_deep"]),
    ("parent replaced", &["engine/hostile_image.rs a_parent_that_was_replaced"]),
    (
        "parent shorter or longer than the child",
        &["engine/hostile_image.rs a_parent_shorter_or_longer_than_the_child"],
    ),
    (
        "raw guest data that starts with our magic",
        &["engine/hostile_image.rs guest_data_that_begins_with_the_magic"],
    ),
    ("truncation at every byte", &["engine/damage.rs a_file_cut_at_any_byte_is_refused"]),
    (
        "every metadata bit flipped",
        &[
            "engine/damage.rs a_flipped_bit_of_a_frozen_parent_gives_the_same_data_or_an_error",
            "engine/damage.rs a_flipped_bit_of_a_closed_top_gives_the_same_data_or_an_error",
            "engine/damage.rs a_flipped_bit_of_a_top_that_was_not_closed_gives_the_same_data_or_an_error",
            "engine/damage.rs a_flipped_bit_of_an_empty_journal_changes_no_data",
        ],
    ),
    (
        "stale journal of an earlier epoch",
        &["engine/hostile_image.rs a_stale_journal_of_an_earlier_epoch"],
    ),
    ("sequence gaps", &["engine/hostile_image.rs gaps_in_the_sequence"]),
    ("count fields beyond their page", &["engine/hostile_image.rs counts_beyond_their_page"]),
];

const NBD: &[(&str, &[&str])] = &[
    ("name length 0xffffffff", &["nbd/nbd_hostile.rs a_name_length_of_0xffffffff_is_invalid"]),
    ("3,000-byte names", &["nbd/nbd_hostile.rs names_of_3000_bytes_are_looked_up"]),
    (
        "options of 32 MiB",
        &["nbd/nbd_hostile.rs options_of_32_mib_are_skipped_and_endless_ones_hung_up_on"],
    ),
    ("data where none belongs", &["nbd/nbd_hostile.rs data_where_none_belongs_is_invalid"]),
    ("hang-up at every stage", &["nbd/nbd_hostile.rs hanging_up_at_every_stage_harms_nobody"]),
    (
        "commands before negotiation ends",
        &["nbd/nbd_hostile.rs commands_before_the_negotiation_ends_are_not_carried_out"],
    ),
    (
        "plaintext options before STARTTLS",
        &["nbd/nbd_hostile.rs unknown_options_and_starttls_leave_both_sides_in_step"],
    ),
    ("status near 4 GiB", &["nbd/nbd_server.rs status_near_4_gib_keeps_its_lengths"]),
    (
        "offsets with the top bit set",
        &["nbd/nbd_server.rs ranges_past_the_end_fail_with_their_errno_and_in_step"],
    ),
    (
        "writes past the end with payload",
        &["nbd/nbd_server.rs ranges_past_the_end_fail_with_their_errno_and_in_step"],
    ),
    ("unknown flags", &["nbd/nbd_server.rs unknown_commands_and_flags_are_refused_in_step"]),
    (
        "writes to a read-only export",
        &["nbd/nbd_server.rs read_only_exports_refuse_changes_and_stay_in_step"],
    ),
    ("half a request and silence", &["nbd/nbd_hostile.rs half_a_request_and_silence_holds_nobody"]),
    (
        "10,000 connections",
        &[
            "nbd/nbd_hostile.rs connections_beyond_the_limit_are_closed_at_once",
            "nbd/nbd_limits.rs idle_connections_are_cheap_and_announced_payloads_cost_nothing",
        ],
    ),
    (
        "a client that never reads its replies",
        &["nbd/nbd_hostile.rs a_client_that_never_reads_holds_nobody_and_no_shutdown"],
    ),
];

const RUNNING: &[(&str, &[&str])] = &[
    (
        "ENOSPC in data, journal and checkpoint",
        &["crash/crash.rs every_call_of_fifty_scripts_fails"],
    ),
    (
        "a host that is full for a while, under clients who wait",
        &[
            "engine/serve.rs what_finds_no_space_waits_and_holds_up_nothing",
            "engine/serve.rs who_waits_no_more_gets_the_error_and_lets_go_of_the_disk",
            "engine/commit.rs a_flush_takes_no_space_where_its_group_has_a_block",
            "nbd/nbd_server.rs the_wait_for_space_ends_with_the_client_and_with_the_server",
        ],
    ),
    (
        "EIO on parent, on sync, on punch",
        &[
            "crash/crash.rs every_call_of_fifty_scripts_fails",
            "engine/hostile_running.rs a_parent_that_cannot_be_read_is_an_error_and_no_zeros",
        ],
    ),
    (
        "short reads and writes, a signal in any system call",
        &["engine/hostile_running.rs short_and_interrupted_calls_are_gone_on_with"],
    ),
    (
        "a failed sync followed by success",
        &[
            "crash/crash.rs every_call_of_fifty_scripts_fails",
            "engine/hostile_running.rs a_failed_sync_is_never_followed_by_success",
        ],
    ),
    (
        "kill at any instant",
        &[
            "crash/crash.rs random_lives",
            "system/kills/kills.rs what_a_killed_server_promised_is_there",
            "system/kills/kills.rs a_store_killed_amid_snapshots_loses_nothing_it_promised",
            "engine/threads.rs what_threads_were_promised_outlives_a_crash_at_any_instant",
        ],
    ),
    (
        "power loss at any instant, inside recovery too",
        &[
            "crash/crash.rs random_lives",
            "crash/crash.rs the_ring_goes_round",
            "engine/threads.rs what_threads_were_promised_outlives_a_crash_at_any_instant",
            "system/power/power.rs what_was_promised_before_a_power_cut_is_there",
            "system/power/power.rs files_over_the_kernels_client_outlive_power_cuts",
        ],
    ),
    ("a second writer", &["engine/chain.rs one_writer_and_the_parent_gate"]),
    (
        "a layer on a file system without hole punching",
        &["engine/hostile_running.rs a_file_system_without_holes_serves_as_well"],
    ),
    (
        "no file descriptors left",
        &[
            "nbd/nbd_limits.rs without_descriptors_the_server_neither_dies_nor_spins",
            "cli/store_limits.rs without_descriptors_clients_that_are_there_go_on",
            "cli/store_limits.rs serving_raises_its_own_limit_of_descriptors",
        ],
    ),
];

const STORE: &[(&str, &[&str])] = &[
    (
        "kill between any two steps of create, commit, remove and collect",
        &[
            "crash/store_crash.rs a_kill_or_a_power_loss_between_any_two_steps_leaves_a_store_that_works",
            "cli/store_kill.rs an_image_comes_whole_or_not_at_all",
            "cli/store_kill.rs an_archive_comes_whole_or_not_at_all",
        ],
    ),
    (
        "two processes at once",
        &[
            "cli/races.rs two_processes_at_each_pair_of_verbs",
            "cli/races.rs two_processes_at_each_pair_of_verbs_on_a_served_container",
            "cli/store.rs commits_and_snapshots_of_a_served_container_at_once_lose_nothing",
        ],
    ),
    (
        "a name taken meanwhile",
        &["cli/store.rs a_name_that_is_taken_is_refused_or_moves_as_an_image_name_does"],
    ),
    (
        "removing what is in use",
        &["cli/store.rs removing_what_is_in_use_is_refused_with_who_uses_it"],
    ),
    (
        "a blob that is missing, short or altered",
        &[
            "cli/store.rs a_blob_that_is_missing_short_or_altered_is_found_and_refused",
            "cli/store_damage.rs a_damaged_blob_hides_nothing_else_and_can_be_removed",
        ],
    ),
    (
        "a full disk, on which removal must still work",
        &[
            "cli/store_limits.rs removal_works_on_a_full_disk",
            "cli/store_limits.rs removal_works_on_a_full_ext4",
        ],
    ),
    (
        "odd names (../x, empty, 300 bytes, Unicode)",
        &["cli/store.rs odd_names_are_refused_and_make_nothing"],
    ),
];

/// What has no test: nothing in the library decides by a wall clock, so a clock that jumps changes
/// nothing. The store alone reads it, in one place, to note when something was made.
#[test]
fn nothing_decides_by_a_wall_clock() {
    fn sources(dir: &Path, visit: &mut dyn FnMut(&Path)) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { sources(&path, visit) } else { visit(&path) }
        }
    }
    let mut seen = 0;
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut |path| {
        let text = fs::read_to_string(path).unwrap();
        let allowed = usize::from(path.ends_with("store/mod.rs"));
        let found = text.matches("SystemTime::now").count();
        assert_eq!(found, allowed, "{} reads a wall clock", path.display());
        // Who has a time that was given can ask how long ago it was.
        let noted = path.ends_with("store/mod.rs") || path.ends_with("store/publish.rs");
        assert!(noted || !text.contains("SystemTime"), "{} has a time", path.display());
        seen += 1;
    });
    assert!(seen > 30);
}

#[test]
fn every_item_has_its_tests() {
    for (item, tests) in [IMAGE, NBD, RUNNING, STORE].into_iter().flatten() {
        assert!(!tests.is_empty(), "{item}");
        for test in *tests {
            let (file, name) = test.split_once(' ').unwrap();
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(file);
            let text = fs::read_to_string(&path).unwrap_or_else(|_| panic!("{item}: no {file}"));
            assert!(text.contains(&format!("\nfn {name}() {{")), "{item}: no {name} in {file}");
        }
    }
}
