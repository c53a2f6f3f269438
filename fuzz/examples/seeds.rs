//! Writes the first inputs of every fuzz target, from real images and real sessions, into
//! `corpus/TARGET/` beside this package's manifest.

use std::fs;
use std::path::Path;

use thinply::format::packed::FRAME_BLOCKS;
use thinply_fuzz::image::{self, CUT, Ending, FIX_CHECKSUMS, FIX_ENTRIES, FIX_LINK};
use thinply_fuzz::packed;

fn put(target: &str, name: &str, input: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(name), input).unwrap();
}

/// An NBD option.
fn option(code: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &code.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

/// An NBD request with its payload.
fn request(flags: u16, kind: u16, offset: u64, payload: &[u8], length: u32) -> Vec<u8> {
    let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&7u64.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn main() {
    for (name, ending) in [("closed", Ending::Closed), ("killed", Ending::Killed)] {
        let files = image::real(ending);
        let all = FIX_CHECKSUMS | FIX_LINK | FIX_ENTRIES;
        for flags in [0, FIX_CHECKSUMS | FIX_LINK, all, all | CUT] {
            let input = image::encode(&files, flags);
            for target in ["image", "repair"] {
                put(target, &format!("{name}-{flags}"), &input);
            }
        }
    }
    // Every operation once, at some edge, with a few lengths.
    for edge in 0..8u8 {
        let input: Vec<u8> = (0..24u8)
            .flat_map(|kind| {
                [
                    kind,
                    edge,
                    255 - kind % 3,
                    kind,
                    0,
                    0,
                    kind * 9,
                    [0, 16, 255][usize::from(kind % 3)],
                ]
            })
            .collect();
        put("operations", &format!("edge-{edge}"), &input);
    }
    for state in 0..3u8 {
        let records = (0..12u8).flat_map(|n| [7 + n, 3, n, n + 5, n + 10, 1, 1, n % 2 * 4]);
        let input: Vec<u8> = [state, 1, state, 50, 2, 1, 2].into_iter().chain(records).collect();
        put("replay", &format!("state-{state}"), &input);
    }
    let name = [&3u32.to_be_bytes()[..], b"one"].concat();
    let context = [&15u32.to_be_bytes()[..], b"base:allocation"].concat();
    let session = [
        vec![0, 0, 0, 3],
        option(3, &[]),
        option(8, &[]),
        option(10, &[name.clone(), vec![0, 0, 0, 1], context].concat()),
        option(6, &[&name[..], &[0, 1, 0, 3]].concat()),
        option(5, &[]),
        option(7, &[name, vec![0, 0]].concat()),
    ];
    let requests = [
        request(1, 1, 4096, &[5; 40], 40),
        request(4, 0, 0, &[], 8192),
        request(0, 3, 0, &[], 0),
        request(8, 7, 0, &[], 1 << 20),
        request(2, 6, 100, &[], 5000),
        request(0, 4, 0, &[], 8192),
        request(0, 5, 0, &[], 8192),
        request(0, 2, 0, &[], 0),
    ];
    put("negotiation", "all", &[session.concat(), requests.concat()].concat());
    put("negotiation", "old", &[&[0, 0, 0, 0][..], &option(1, b"one")].concat());
    for style in 0..64u8 {
        let bytes = if style & 16 == 0 {
            (0..16u8).flat_map(|n| [n * 3, n % 4, 4 + n, n * 15, n, n * 17, n % 9, n]).collect()
        } else {
            requests.concat()
        };
        put(
            "transmission",
            &format!("style-{style}"),
            &[&[style, style.rotate_left(3)][..], &bytes].concat(),
        );
    }
    // Zeros, text and noise in neighbouring blocks and at the edges of groups; a patch of each part.
    let blocks =
        [0, 200, 0, 201, 0, 70, 0, 71, 0, 0, 9, 90, 60, 255, 254, 100, 0, 200, 255, 80, 255, 1];
    for flags in 0..16u8 {
        for frame_blocks in [1, FRAME_BLOCKS as u8, 64] {
            let head = [flags, frame_blocks, 0, 4, blocks.len() as u8 / 2];
            let input = [&head[..], &blocks].concat();
            put("packed", &format!("flags-{flags}-{frame_blocks}"), &input);
            for part in 0..6u8 {
                let patch = [part, part % 2, 17 * part, 0, 3, 1, 2, 3];
                let name = format!("flags-{flags}-{frame_blocks}-part-{part}");
                put("packed", &name, &[&input[..], &patch].concat());
            }
        }
    }
    let most: Vec<u8> = (0..95).flat_map(|n| [0, 64 + n * 2]).collect();
    let head = [packed::FIX_CHECKSUMS | packed::FIX_HASHES, 1, 0, 0, 95];
    put("packed", "two-chunks", &[&head[..], &most].concat());
}
