//! `format-spec.md` against the code: the tables of every struct, the constants, the worked
//! examples and the test vectors. The numbers here are literal on purpose: an accidental change of
//! the format must fail, even one that code and spec make together.

use thinply::format::geometry::{
    GROUP_SLOT_SIZE, GROUP_STRIDE, GROUPS_OFFSET, JOURNAL_OFFSET, JOURNAL_RECORDS,
    MAX_VIRTUAL_SIZE, SLOT_OFFSETS, bitmap_offset, block_offset, file_length, record_offset,
};
use thinply::format::header::{Header, MAGIC, MAX_HINT, ParentLink, State, VERSION};
use thinply::format::journal::{Entry, RECORD_CAPACITY, Record};
use thinply::format::{bitmap, journal, layouts};
use thinply::types::{
    BLOCK_SIZE, Block, FreezeId, GROUP_BLOCKS, GROUP_WORDS, Group, Identity, Root, SECTOR_SIZE,
    Uuid, WORD_BLOCKS,
};

const SPEC: &str = include_str!("../../format-spec.md");
const UUID: Uuid = Uuid([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);

/// The text from a heading to the next one.
fn section(heading: &str) -> &'static str {
    let start = SPEC.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading:?}"));
    let body = &SPEC[start + heading.len() + 2..];
    body.find("\n#").map_or(body, |end| &body[..end])
}

/// The rows of the first table below a heading whose first column is called `first`, without its
/// head, cut into cells without backticks.
fn table(heading: &str, first: &str) -> Vec<Vec<String>> {
    section(heading)
        .lines()
        .skip_while(|line| !line.starts_with(&format!("| {first} |")))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells = line.trim_matches('|').split(" | ");
            cells.map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
        })
        .collect()
}

/// The first two columns of a table, with numbers in the second.
fn numbers(heading: &str, first: &str) -> Vec<(String, u64)> {
    table(heading, first)
        .into_iter()
        .map(|row| match row[1].strip_prefix("0x") {
            Some(hex) => (row[0].clone(), u64::from_str_radix(hex, 16).unwrap()),
            None => (row[0].clone(), row[1].parse().unwrap()),
        })
        .collect()
}

#[test]
fn the_tables_list_exactly_the_fields_of_the_structs() {
    for (name, fields) in layouts() {
        let rows = table(&format!("### {name}"), "offset");
        let spec: Vec<(&str, usize, usize)> = rows
            .iter()
            .map(|row| (&*row[2], row[0].parse().unwrap(), row[1].parse().unwrap()))
            .collect();
        assert_eq!(spec, fields, "{name}");
        let mut end = 0;
        for (field, offset, size) in fields {
            assert_eq!(offset, end, "{name}: bytes before {field} belong to no field");
            end = offset + size;
        }
    }
    let tables = SPEC.lines().filter(|line| line.starts_with("| offset | size | field |")).count();
    assert_eq!(tables, layouts().len(), "the spec has a table for a struct that is not listed");
}

#[test]
fn sizes_of_structs() {
    let sizes: Vec<(&str, usize, usize)> = layouts()
        .into_iter()
        .map(|(name, fields)| {
            let &(_, offset, size) = fields.last().unwrap();
            (name, fields.len(), offset + size)
        })
        .collect();
    assert_eq!(
        sizes,
        [
            ("Header slot", 30, 4096),
            ("Extension", 4, 16),
            ("Journal record", 8, 4096),
            ("Journal entry", 2, 12),
            ("Bitmap sector", 2, 512),
            ("Packed header", 17, 4096),
            ("Frame entry", 3, 40),
            ("Group map", 6, 96),
            ("Map word", 2, 16),
            ("Directory entry", 5, 56),
            ("Footer", 10, 128),
        ]
    );
}

#[test]
fn constants() {
    let pinned: [(&str, u64, u64); 15] = [
        ("SECTOR_SIZE", 512, SECTOR_SIZE),
        ("BLOCK_SIZE", 4096, BLOCK_SIZE),
        ("WORD_BLOCKS", 64, WORD_BLOCKS),
        ("SLOT_0_OFFSET", 0, SLOT_OFFSETS[0].0),
        ("SLOT_1_OFFSET", 65536, SLOT_OFFSETS[1].0),
        ("JOURNAL_OFFSET", 1_048_576, JOURNAL_OFFSET.0),
        ("JOURNAL_RECORDS", 256, JOURNAL_RECORDS),
        ("RECORD_CAPACITY", 338, RECORD_CAPACITY as u64),
        ("GROUPS_OFFSET", 2_097_152, GROUPS_OFFSET.0),
        ("GROUP_STRIDE", 134_217_728, GROUP_STRIDE),
        ("GROUP_SLOT_SIZE", 1_048_576, GROUP_SLOT_SIZE),
        ("GROUP_BLOCKS", 32512, GROUP_BLOCKS),
        ("MAX_VIRTUAL_SIZE", 72_057_594_037_927_936, MAX_VIRTUAL_SIZE),
        ("MAX_HINT", 255, MAX_HINT as u64),
        ("HEADER_VERSION", 1, u64::from(VERSION)),
    ];
    let spec = numbers("## Units and terms", "constant");
    for (name, literal, code) in pinned {
        assert_eq!(code, literal, "{name} in the code");
        assert!(spec.contains(&(name.into(), literal)), "{name} in the spec");
    }
    assert_eq!(spec.len(), pinned.len(), "the spec has a constant that is not pinned");
    assert_eq!(&MAGIC, b"TPLYLIVE");
    assert!(section("### Header slot").contains("`TPLYLIVE`"));
    assert!(section("### Journal record").contains("`TPJR`"));
}

#[test]
fn the_header_table_names_the_constants_it_fixes() {
    let fixed = [
        ("version", 8, 4, 1u64),
        ("header_size", 12, 4, 4096),
        ("block_size_log2", 68, 4, 12),
        ("journal_offset", 104, 8, 1_048_576),
        ("journal_records", 112, 4, 256),
        ("record_size", 116, 4, 4096),
        ("groups_offset", 120, 8, 2_097_152),
        ("group_stride", 128, 8, 134_217_728),
        ("group_slot_size", 136, 4, 1_048_576),
        ("group_blocks", 140, 4, 32512),
    ];
    let rows = table("### Header slot", "offset");
    let bytes = header().encode(0);
    for (name, offset, size, value) in fixed {
        let row = rows.iter().find(|row| row[2] == name).unwrap();
        assert_eq!(row[3], value.to_string(), "{name} in the spec");
        assert_eq!(bytes[offset..offset + size], value.to_le_bytes()[..size], "{name} in a slot");
    }
}

#[test]
fn worked_examples() {
    let pinned = [
        ("block_offset(0)", 3_145_728, block_offset(Block(0)).0),
        ("block_offset(32511)", 136_310_784, block_offset(Block(32511)).0),
        ("block_offset(32512)", 137_363_456, block_offset(Block(32512)).0),
        ("block_offset(262143)", 1_085_272_064, block_offset(Block(262_143)).0),
        ("bitmap_offset(0)", 2_097_152, bitmap_offset(Group(0)).0),
        ("bitmap_offset(1)", 136_314_880, bitmap_offset(Group(1)).0),
        ("record_offset(0)", 1_048_576, record_offset(0).0),
        ("record_offset(257)", 1_052_672, record_offset(257).0),
        ("file_length(512)", 3_149_824, file_length(512)),
        ("file_length(133169152)", 136_314_880, file_length(133_169_152)),
        ("file_length(133169664)", 137_367_552, file_length(133_169_664)),
        ("file_length(1073741824)", 1_085_276_160, file_length(1_073_741_824)),
    ];
    let spec = numbers("## Live layout", "what");
    for (name, literal, code) in pinned {
        assert_eq!(code, literal, "{name} in the code");
        assert!(spec.contains(&(name.into(), literal)), "{name} in the spec");
    }
    assert_eq!(spec.len(), pinned.len(), "the spec has an example that is not pinned");
    assert!(file_length(MAX_VIRTUAL_SIZE) < 1 << 57);
}

/// The header of the test vectors.
fn header() -> Header {
    Header {
        uuid: UUID,
        generation: 1,
        state: State::Writable,
        epoch: 0,
        journal_tail: 0,
        virtual_size: 1 << 20,
        visible_parent_size: 0,
        parent: None,
        compatible: 0,
        read_only_compatible: 0,
        extensions: Vec::new(),
    }
}

fn number(bytes: &[u8]) -> u64 {
    u64::from(u32::from_le_bytes(bytes.try_into().unwrap()))
}

#[test]
fn test_vectors() {
    let second = Header { generation: 2, ..header() };
    let zeros = crc32fast::hash(&[0; 4096]);
    let entries = vec![Entry { block: Block(5), crc: zeros }];
    let record = journal::encode(UUID, &Record { epoch: 1, sequence: 0, entries });
    let mut bits = [0; GROUP_WORDS as usize];
    bits[0] = 1 << 5;
    let page = bitmap::encode(UUID, Group(3), &bits);
    assert_eq!(&record[..4], b"TPJR");
    let pinned = [
        (0x3939_241a, number(&header().encode(0)[4092..])),
        (0x7f94_d54f, number(&second.encode(1)[4092..])),
        (0xc71c_0011, u64::from(zeros)),
        (0xf878_a8c4, number(&record[4..8])),
        (0xc0cc_8a7e, number(&page[508..512])),
    ];
    let spec = numbers("## Test vectors", "what");
    assert_eq!(spec.len(), pinned.len());
    for ((literal, code), (name, spec)) in pinned.into_iter().zip(spec) {
        assert_eq!(code, literal, "{name} in the code");
        assert_eq!(spec, literal, "{name} in the spec");
    }
}

/// What the tables say in words: numbers of states and parent kinds, and the order inside an
/// identity.
#[test]
fn states_and_parent_kinds() {
    let parent = |identity| Some(ParentLink { identity, hint: "base".into() });
    let frozen = Header {
        state: State::Frozen(FreezeId([9; 16])),
        parent: parent(Identity::Frozen(UUID, FreezeId([8; 16]))),
        ..header()
    };
    let bytes = frozen.encode(0);
    assert_eq!((number(&bytes[64..68]), &bytes[144..160]), (3, &[9; 16][..]));
    assert_eq!((number(&bytes[160..164]), number(&bytes[164..168])), (1, 4));
    assert_eq!((&bytes[168..184], &bytes[184..200]), (&UUID.0[..], &[8; 16][..]));
    assert_eq!(&bytes[200..205], b"base\0");
    let in_use =
        Header { state: State::InUse, parent: parent(Identity::Packed(Root([7; 32]))), ..header() };
    let bytes = in_use.encode(0);
    assert_eq!((number(&bytes[64..68]), number(&bytes[160..164])), (2, 2));
    assert_eq!(&bytes[168..200], &[7; 32]);
    assert_eq!(number(&header().encode(0)[64..68]), 1);
}

/// "The bit of the block with `index(b)` = i is in sector i div 4064, byte (i mod 4064) div 8".
#[test]
fn the_place_of_a_bit() {
    for index in [0usize, 7, 63, 64, 4063, 4064, 8127, 8128, 32511] {
        let mut bits = [0; GROUP_WORDS as usize];
        bits[index / 64] = 1 << (index % 64);
        let page = bitmap::encode(UUID, Group(0), &bits);
        let at = index / 4064 * 512 + index % 4064 / 8;
        assert_eq!(page[at], 1 << (index % 8), "bit {index}");
        let set: u32 =
            page.chunks(512).flat_map(|sector| &sector[..508]).map(|b| b.count_ones()).sum();
        assert_eq!(set, 1, "bit {index}");
    }
}
