//! Requests and answers against the kernel's layouts.

use proptest::prelude::*;

use super::*;

/// A request as the kernel builds it.
fn request(opcode: u32, arguments: &[u8]) -> Vec<u8> {
    let header = RawHeader {
        length: ((HEADER + arguments.len()) as u32).into(),
        opcode: opcode.into(),
        unique: 42.into(),
        node: 7.into(),
        uid: 0.into(),
        gid: 0.into(),
        pid: 0.into(),
        extensions: 0.into(),
        padding: 0.into(),
    };
    [header.as_bytes(), arguments].concat()
}

fn command_of(opcode: u32, arguments: &[u8]) -> Result<String, Violation> {
    let bytes = request(opcode, arguments);
    let request = parse(&bytes)?;
    assert_eq!((request.unique, request.node), (42, 7));
    Ok(format!("{:?}", request.command))
}

/// `include/uapi/linux/fuse.h` has these as `FUSE_COMPAT_…_SIZE` or by its members.
#[test]
fn structures_have_the_kernels_sizes() {
    assert_eq!((HEADER, ANSWER_HEADER, WRITE_HEADER), (40, 16, 80));
    assert_eq!(size_of::<RawInit>(), 16);
    assert_eq!(size_of::<RawInitAnswer>(), 64);
    assert_eq!(size_of::<RawAttributes>(), 88);
    assert_eq!(size_of::<RawAttributesAnswer>(), 104);
    assert_eq!(size_of::<RawEntry>(), 128);
    assert_eq!(size_of::<RawOpenAnswer>(), 16);
    assert_eq!(size_of::<RawRelease>(), 24);
    assert_eq!(size_of::<RawAllocate>(), 32);
    assert_eq!(size_of::<RawSeek>(), 24);
    assert_eq!(size_of::<RawCopy>(), 56);
    assert_eq!(size_of::<RawSpace>(), 80);
    assert_eq!(size_of::<RawListed>(), 24);
}

#[test]
fn requests_are_read_as_they_were_meant() {
    let numbers = |list: &[u64]| list.iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<_>>();
    let io = |size: u64, rest: &[u8]| [numbers(&[3, 4096, size, 0, 0]), rest.to_vec()].concat();
    let read = command_of(opcodes::READ, &io(512, &[])).unwrap();
    assert_eq!(read, "Read { handle: 3, offset: 4096, length: 512 }");
    let write = command_of(opcodes::WRITE, &io(2, b"ab")).unwrap();
    assert!(write.starts_with("Write { handle: 3, offset: 4096, data: [97, 98], durable: false"));
    assert!(command_of(opcodes::WRITE, &io(3, b"ab")).is_err());
    assert!(command_of(opcodes::WRITE, b"ab").is_err());
    assert_eq!(command_of(opcodes::LOOKUP, b"ab\0").unwrap(), "Lookup { name: [97, 98] }");
    assert!(command_of(opcodes::LOOKUP, b"ab").is_err());
    for (flags, expected) in [
        (0o2, (true, false, false)),
        (0o10_001, (true, true, false)),
        (0o1_000, (true, false, true)),
        (0o4_000_000, (false, false, false)),
    ] {
        let (writes, durable, cut) = expected;
        let expected = format!("{:?}", Command::Open(Access { writes, durable, cut }));
        assert_eq!(command_of(opcodes::OPEN, &numbers(&[flags])).unwrap(), expected);
    }
    let copy = command_of(opcodes::COPY_FILE_RANGE, &numbers(&[1, 2, 3, 4, 5, 6, 0])).unwrap();
    let to = "Place { node: 3, handle: 4, offset: 5 }";
    assert_eq!(copy, format!("Copy {{ handle: 1, offset: 2, to: {to}, length: 6 }}"));
    assert!(command_of(opcodes::COPY_FILE_RANGE, &numbers(&[1, 2, 3, 4, 5, 6])).is_err());
    let cut = numbers(&[u64::from(SET_SIZE), 9, 77]);
    let cut = command_of(opcodes::SETATTR, &cut).unwrap();
    assert_eq!(cut, "SetAttributes { handle: None, size: Some(77), others: false }");
    assert_eq!(command_of(opcodes::MKNOD, b"x\0").unwrap(), "Change");
    assert_eq!(command_of(9999, b"").unwrap(), "Unknown");
    let mut short = request(opcodes::STATFS, b"");
    short.push(0);
    assert!(parse(&short).is_err());
}

#[test]
fn old_kernels_get_what_they_understand() {
    let kernel = |minor, flags| Kernel { major: 7, minor, max_readahead: 0, flags };
    assert_eq!(init(&kernel(11, 0), 8), Err(Errno::PROTO));
    assert_eq!(init(&kernel(22, 0), 8).unwrap().len(), 24);
    let all = init(&kernel(45, u64::MAX), 8).unwrap();
    let (raw, _) = head::<RawInitAnswer>(&all).unwrap();
    assert_eq!((all.len(), raw.minor.get(), raw.max_pages.get()), (64, MINOR, MAX_PAGES));
    let flags = u64::from(raw.flags2.get()) << 32 | u64::from(raw.flags.get());
    assert_eq!(flags, flags::WANTED);
    assert!(kernel(45, u64::MAX).sends_again() && !kernel(38, u64::from(u32::MAX)).sends_again());
}

#[test]
fn a_folder_is_listed_as_far_as_there_is_room() {
    let mut out = Vec::new();
    assert!(list(&mut out, 64, 20, 20, false, "a"));
    assert!(list(&mut out, 64, 21, 21, true, "12345678"));
    assert!(!list(&mut out, 64, 22, 22, true, "b"));
    assert_eq!(out.len(), 64);
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_or_none(
        opcode in 0u32..60,
        arguments in proptest::collection::vec(any::<u8>(), 0..200),
        cut in 0usize..300,
        extensions in any::<u16>(),
    ) {
        let mut bytes = request(opcode, &arguments);
        bytes[36..38].copy_from_slice(&extensions.to_ne_bytes());
        let _ = parse(&bytes);
        bytes[36..38].fill(0);
        let _ = parse(&bytes);
        bytes.truncate(cut);
        let _ = parse(&bytes);
    }
}
