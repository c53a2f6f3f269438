//! The handshake ("Fixed newstyle negotiation") as a state machine over bytes.
//!
//! [`Negotiation::feed`] takes one step at a time: it looks at the bytes received so far, says how
//! many it took and appends the answer. Invariants: an option is answered only once all of it is
//! there, at most [`MAX_OPTION`] bytes; a longer one is refused and skipped without being kept, so
//! the two sides stay in step; the metadata contexts chosen belong to one export name.

use super::numbers::*;
use super::{BASE_ALLOCATION, MAX_DRAIN, MAX_NAME, MAX_PAYLOAD, Reader, put_u16, put_u32, put_u64};

/// Any alignment is served, whole blocks of the format best.
const MIN_BLOCK: u32 = 1;
const PREFERRED_BLOCK: u32 = 4096;

/// Transmission flags of every export.
const FLAGS_ALWAYS: u16 = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_CACHE;
/// Those of exports that can be written.
const FLAGS_WRITABLE: u16 = FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;

const BASE_NAMESPACE: &[u8] = b"base:";

const OPTION_HEADER: usize = 16;
/// Longest option that is looked at: an export name and a few queries.
const MAX_OPTION: u32 = 64 << 10;

/// What a client is told of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The name it goes by, at most [`MAX_NAME`] bytes.
    pub name: String,
    /// A line for people, possibly empty, at most [`MAX_NAME`] bytes.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// Whether writes, zeros and trims are refused.
    pub read_only: bool,
    /// Whether several connections may use it at a time.
    pub multi_conn: bool,
}

/// Why an export can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is none of that name, or it does not open.
    Unknown,
    /// This client may not have it.
    Policy,
}

/// Where the negotiation finds exports.
pub trait Catalog {
    /// An export as the server holds it.
    type Export;

    /// The export called `name`, to be used; the empty name asks for a default.
    fn find(&self, name: &str) -> Result<Self::Export, Refused>;

    /// What to tell of the export called `name`, whoever uses it.
    fn look(&self, name: &str) -> Result<Description, Refused>;

    /// What to tell of `export`.
    fn describe(&self, export: &Self::Export) -> Description;

    /// Name and description of all exports that may be told.
    fn list(&self) -> Vec<(String, String)>;
}

/// What was agreed on.
#[derive(Debug, PartialEq, Eq)]
pub struct Session<E> {
    /// The export.
    pub export: E,
    /// Whether structured replies were negotiated.
    pub structured: bool,
    /// Whether the `base:allocation` context was chosen for this export.
    pub allocation: bool,
}

/// What one step of [`Negotiation::feed`] came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<E> {
    /// More bytes must be received first.
    NeedMore,
    /// Something was done; call again.
    Again,
    /// The handshake is over: send the answer, then start the transmission phase.
    Transmit(Session<E>),
    /// Send the answer, then hang up, for this reason.
    Close(&'static str),
}

enum Phase {
    ClientFlags,
    Options,
    /// Skipping what is left of an option too long to look at.
    Skip(u32),
}

/// The server's side of one handshake.
pub struct Negotiation {
    phase: Phase,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export name for which `base:allocation` was chosen.
    allocation: Option<Vec<u8>>,
}

/// An option request whose data has arrived.
struct Opt<'a> {
    code: u32,
    data: &'a [u8],
}

impl Default for Negotiation {
    fn default() -> Self {
        Self::new()
    }
}

impl Negotiation {
    /// The state before the client's first byte.
    pub fn new() -> Self {
        Self {
            phase: Phase::ClientFlags,
            fixed: false,
            no_zeroes: false,
            structured: false,
            allocation: None,
        }
    }

    /// What the server sends first.
    pub fn greeting() -> Vec<u8> {
        let mut out = Vec::new();
        put_u64(&mut out, INIT_MAGIC);
        put_u64(&mut out, OPTION_MAGIC);
        put_u16(&mut out, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        out
    }

    /// Takes a step: answers how many bytes of `input` it took, at most all of them, and what
    /// comes next. What is to be sent is appended to `out`.
    pub fn feed<C: Catalog>(
        &mut self,
        input: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> (usize, Step<C::Export>) {
        match self.phase {
            Phase::ClientFlags => self.client_flags(input),
            Phase::Options => self.option(input, catalog, out),
            Phase::Skip(left) => {
                let taken = input.len().min(left as usize);
                let left = left - taken as u32;
                self.phase = if left == 0 { Phase::Options } else { Phase::Skip(left) };
                (taken, if taken == 0 && left > 0 { Step::NeedMore } else { Step::Again })
            }
        }
    }

    fn client_flags<E>(&mut self, input: &[u8]) -> (usize, Step<E>) {
        let Some(flags) = Reader(input).u32() else { return (0, Step::NeedMore) };
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if flags & !known != 0 {
            return (4, Step::Close("unknown client flags"));
        }
        self.fixed = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        self.phase = Phase::Options;
        (4, Step::Again)
    }

    fn option<C: Catalog>(
        &mut self,
        input: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> (usize, Step<C::Export>) {
        let mut reader = Reader(input);
        let (Some(magic), Some(code), Some(length)) = (reader.u64(), reader.u32(), reader.u32())
        else {
            return (0, Step::NeedMore);
        };
        if magic != OPTION_MAGIC {
            return (OPTION_HEADER, Step::Close("an option without its magic number"));
        }
        if !self.fixed && code != OPT_EXPORT_NAME {
            return (OPTION_HEADER, Step::Close("an option that needs fixed newstyle"));
        }
        if length > MAX_OPTION {
            if length > MAX_DRAIN || code == OPT_EXPORT_NAME {
                return (OPTION_HEADER, Step::Close("an option too long to skip"));
            }
            reply_error(out, code, REP_ERR_TOO_BIG, "option too long");
            self.phase = Phase::Skip(length);
            return (OPTION_HEADER, Step::Again);
        }
        let Some(data) = reader.bytes(length as usize) else { return (0, Step::NeedMore) };
        let step = self.answer(&Opt { code, data }, catalog, out);
        (OPTION_HEADER + data.len(), step)
    }

    fn answer<C: Catalog>(
        &mut self,
        opt: &Opt<'_>,
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Step<C::Export> {
        match opt.code {
            OPT_EXPORT_NAME => return self.export_name(opt, catalog, out),
            OPT_GO | OPT_INFO => return self.go_or_info(opt, catalog, out),
            // "A server SHOULD ignore any data sent by the client" with this one.
            OPT_ABORT => {
                reply(out, opt.code, REP_ACK, &[]);
                return Step::Close("");
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta_context(opt, catalog, out),
            OPT_LIST | OPT_STRUCTURED_REPLY if !opt.data.is_empty() => {
                reply_error(out, opt.code, REP_ERR_INVALID, "this option takes no data");
            }
            OPT_LIST => {
                for (name, description) in catalog.list() {
                    let mut payload = Vec::with_capacity(4 + name.len() + description.len());
                    put_u32(&mut payload, name.len() as u32);
                    payload.extend_from_slice(name.as_bytes());
                    payload.extend_from_slice(description.as_bytes());
                    reply(out, opt.code, REP_SERVER, &payload);
                }
                reply(out, opt.code, REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY => {
                self.structured = true;
                reply(out, opt.code, REP_ACK, &[]);
            }
            _ => reply_error(out, opt.code, REP_ERR_UNSUP, "unknown option"),
        }
        Step::Again
    }

    /// `NBD_OPT_EXPORT_NAME` has no way to say no but to hang up.
    fn export_name<C: Catalog>(
        &mut self,
        opt: &Opt<'_>,
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Step<C::Export> {
        let Ok(export) = named(opt.data, |name| catalog.find(name)) else {
            return Step::Close("no export of the name asked for");
        };
        let description = catalog.describe(&export);
        put_u64(out, description.size);
        put_u16(out, self.transmission_flags(&description));
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.transmit(export, opt.data)
    }

    fn go_or_info<C: Catalog>(
        &mut self,
        opt: &Opt<'_>,
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Step<C::Export> {
        let Some((name, wanted)) = parse_info(opt.data) else {
            reply_error(out, opt.code, REP_ERR_INVALID, "malformed option");
            return Step::Again;
        };
        let found = if opt.code == OPT_GO {
            named(name, |name| catalog.find(name))
                .map(|export| (catalog.describe(&export), Some(export)))
        } else {
            // Who only asks keeps nobody out, and waits for nobody.
            named(name, |name| catalog.look(name)).map(|description| (description, None))
        };
        let (description, export) = match found {
            Ok(found) => found,
            Err((error, message)) => {
                reply_error(out, opt.code, error, message);
                return Step::Again;
            }
        };
        let mut info = |kind: u16, fill: &dyn Fn(&mut Vec<u8>)| {
            let mut payload = Vec::new();
            put_u16(&mut payload, kind);
            fill(&mut payload);
            reply(out, opt.code, REP_INFO, &payload);
        };
        info(INFO_EXPORT, &|payload| {
            put_u64(payload, description.size);
            put_u16(payload, self.transmission_flags(&description));
        });
        if wanted.contains(&INFO_NAME) {
            info(INFO_NAME, &|p| p.extend_from_slice(description.name.as_bytes()));
        }
        if wanted.contains(&INFO_DESCRIPTION) && !description.description.is_empty() {
            info(INFO_DESCRIPTION, &|p| p.extend_from_slice(description.description.as_bytes()));
        }
        if wanted.contains(&INFO_BLOCK_SIZE) {
            info(INFO_BLOCK_SIZE, &|payload| {
                put_u32(payload, MIN_BLOCK);
                put_u32(payload, PREFERRED_BLOCK);
                put_u32(payload, MAX_PAYLOAD);
            });
        }
        reply(out, opt.code, REP_ACK, &[]);
        export.map_or(Step::Again, |export| self.transmit(export, name))
    }

    fn transmit<E>(&self, export: E, name: &[u8]) -> Step<E> {
        let allocation = self.allocation.as_deref() == Some(name);
        Step::Transmit(Session { export, structured: self.structured, allocation })
    }

    fn transmission_flags(&self, description: &Description) -> u16 {
        let access = if description.read_only { FLAG_READ_ONLY } else { FLAGS_WRITABLE };
        let connections = if description.multi_conn { FLAG_CAN_MULTI_CONN } else { 0 };
        FLAGS_ALWAYS | access | connections | if self.structured { FLAG_SEND_DF } else { 0 }
    }

    fn meta_context<C: Catalog>(&mut self, opt: &Opt<'_>, catalog: &C, out: &mut Vec<u8>) {
        let set = opt.code == OPT_SET_META_CONTEXT;
        if set {
            // An earlier choice is gone even if this one fails.
            self.allocation = None;
            if !self.structured {
                return reply_error(out, opt.code, REP_ERR_INVALID, "needs structured replies");
            }
        }
        let Some((name, queries)) = parse_meta(opt.data) else {
            return reply_error(out, opt.code, REP_ERR_INVALID, "malformed option");
        };
        if let Err((error, message)) = named(name, |name| catalog.look(name)) {
            return reply_error(out, opt.code, error, message);
        }
        let matches = |query: &&[u8]| {
            *query == ALLOCATION_NAME.as_bytes() || !set && *query == BASE_NAMESPACE
        };
        if queries.iter().any(matches) || !set && queries.is_empty() {
            let mut payload = Vec::new();
            put_u32(&mut payload, if set { BASE_ALLOCATION } else { 0 });
            payload.extend_from_slice(ALLOCATION_NAME.as_bytes());
            reply(out, opt.code, REP_META_CONTEXT, &payload);
            if set {
                self.allocation = Some(name.to_vec());
            }
        }
        reply(out, opt.code, REP_ACK, &[]);
    }
}

/// The export name and the information asked for; nothing may follow.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u16()?;
    let wanted = (0..count).map(|_| reader.u16()).collect::<Option<_>>()?;
    reader.is_empty().then_some((name, wanted))
}

/// The export name and the queries; nothing may follow.
fn parse_meta(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u32()?;
    // Ends at the first query that isn't there, whatever the count claims.
    let queries = (0..count).map(|_| reader.string()).collect::<Option<Vec<_>>>()?;
    let fit = queries.iter().all(|query| query.len() <= MAX_NAME);
    (fit && reader.is_empty()).then_some((name, queries))
}

/// What `find` finds under the name that a client sent.
fn named<T>(
    name: &[u8],
    find: impl FnOnce(&str) -> Result<T, Refused>,
) -> Result<T, (u32, &'static str)> {
    if name.len() > MAX_NAME {
        return Err((REP_ERR_TOO_BIG, "export name too long"));
    }
    let name = str::from_utf8(name).map_err(|_| (REP_ERR_INVALID, "export name is not UTF-8"))?;
    find(name).map_err(|refused| match refused {
        Refused::Unknown => (REP_ERR_UNKNOWN, "no such export"),
        Refused::Policy => (REP_ERR_POLICY, "this export may not be used"),
    })
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    put_u64(out, OPTION_REPLY_MAGIC);
    put_u32(out, option);
    put_u32(out, kind);
    put_u32(out, payload.len() as u32);
    out.extend_from_slice(payload);
}

fn reply_error(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    reply(out, option, kind, message.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct One;

    impl Catalog for One {
        type Export = String;

        fn find(&self, name: &str) -> Result<String, Refused> {
            match name {
                "" | "disk" => Ok(name.into()),
                "secret" => Err(Refused::Policy),
                _ => Err(Refused::Unknown),
            }
        }

        fn look(&self, name: &str) -> Result<Description, Refused> {
            self.find(name).map(|export| self.describe(&export))
        }

        fn describe(&self, export: &String) -> Description {
            let (name, description) = (export.clone(), "a disk".into());
            Description { name, description, size: 1 << 20, read_only: false, multi_conn: true }
        }

        fn list(&self) -> Vec<(String, String)> {
            vec![("disk".into(), "a disk".into())]
        }
    }

    fn option(code: u32, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_u64(&mut out, OPTION_MAGIC);
        put_u32(&mut out, code);
        put_u32(&mut out, data.len() as u32);
        out.extend_from_slice(data);
        out
    }

    fn name_first(name: &[u8], rest: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_u32(&mut out, name.len() as u32);
        out.extend_from_slice(name);
        out.extend_from_slice(rest);
        out
    }

    fn meta(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
        let mut rest = Vec::new();
        put_u32(&mut rest, queries.len() as u32);
        for query in queries {
            rest.extend_from_slice(&name_first(query, &[]));
        }
        name_first(name, &rest)
    }

    /// Feeds everything, checking the promises; answers reply kinds and where it stopped.
    fn run(input: &[u8]) -> (Vec<u32>, Step<String>, usize) {
        let (mut negotiation, mut out, mut at) = (Negotiation::new(), Vec::new(), 0);
        loop {
            let (taken, step) = negotiation.feed(&input[at..], &One, &mut out);
            assert!(taken <= input.len() - at);
            at += taken;
            match step {
                Step::Again => {}
                step => return (kinds(&out), step, at),
            }
        }
    }

    fn kinds(out: &[u8]) -> Vec<u32> {
        let mut reader = Reader(out);
        let mut kinds = Vec::new();
        while reader.u64() == Some(OPTION_REPLY_MAGIC) {
            reader.u32().unwrap();
            kinds.push(reader.u32().unwrap());
            reader.string().unwrap();
        }
        kinds
    }

    fn client(options: &[Vec<u8>]) -> Vec<u8> {
        let mut out = vec![0, 0, 0, 3];
        options.iter().for_each(|option| out.extend_from_slice(option));
        out
    }

    #[test]
    fn contexts_are_forgotten_when_go_names_another_export() {
        let structured = option(OPT_STRUCTURED_REPLY, &[]);
        let set = option(OPT_SET_META_CONTEXT, &meta(b"disk", &[b"base:allocation", b"x:y"]));
        for (name, allocation) in [(&b"disk"[..], true), (&b""[..], false)] {
            let go = option(OPT_GO, &name_first(name, &[0, 0]));
            let (kinds, step, _) = run(&client(&[structured.clone(), set.clone(), go]));
            assert_eq!(kinds, [REP_ACK, REP_META_CONTEXT, REP_ACK, REP_INFO, REP_ACK]);
            let Step::Transmit(session) = step else { panic!("{step:?}") };
            assert_eq!((session.structured, session.allocation), (true, allocation));
        }
    }

    #[test]
    fn a_failed_choice_also_forgets_the_earlier_one() {
        let options = [
            option(OPT_STRUCTURED_REPLY, &[]),
            option(OPT_SET_META_CONTEXT, &meta(b"disk", &[b"base:allocation"])),
            option(OPT_SET_META_CONTEXT, &meta(b"nodisk", &[b"base:allocation"])),
            option(OPT_GO, &name_first(b"disk", &[0, 0])),
        ];
        let (_, step, _) = run(&client(&options));
        let Step::Transmit(session) = step else { panic!("{step:?}") };
        assert!(!session.allocation);
    }

    #[test]
    fn wildcards_list_but_do_not_select() {
        for (code, queries, found) in [
            (OPT_LIST_META_CONTEXT, &[][..], true),
            (OPT_LIST_META_CONTEXT, &[&b"base:"[..]][..], true),
            (OPT_LIST_META_CONTEXT, &[&b"base:other"[..]][..], false),
            (OPT_SET_META_CONTEXT, &[][..], false),
            (OPT_SET_META_CONTEXT, &[&b"base:"[..]][..], false),
            (OPT_SET_META_CONTEXT, &[&b"base:allocation"[..]][..], true),
        ] {
            let structured = option(OPT_STRUCTURED_REPLY, &[]);
            let (kinds, ..) = run(&client(&[structured, option(code, &meta(b"disk", queries))]));
            assert_eq!(kinds.contains(&REP_META_CONTEXT), found, "{code} {queries:?}");
            assert_eq!(kinds.last(), Some(&REP_ACK));
        }
    }

    #[test]
    fn malformed_options_are_refused_and_the_next_one_is_understood() {
        let huge_name = [&[255; 4][..], b"disk", &[0, 0]].concat();
        let huge_count = name_first(b"disk", &[255, 255, 255, 255]);
        for (code, data, error) in [
            (OPT_GO, vec![], REP_ERR_INVALID),
            (OPT_GO, huge_name.clone(), REP_ERR_INVALID),
            (OPT_GO, name_first(b"disk", &[0, 1]), REP_ERR_INVALID),
            (OPT_GO, name_first(b"disk", &[0, 0, 0]), REP_ERR_INVALID),
            (OPT_GO, name_first(&[0xff, 0xfe], &[0, 0]), REP_ERR_INVALID),
            (OPT_GO, name_first(&[b'a'; 3000], &[0, 0]), REP_ERR_UNKNOWN),
            (OPT_GO, name_first(&[b'a'; 5000], &[0, 0]), REP_ERR_TOO_BIG),
            (OPT_INFO, name_first(b"secret", &[0, 0]), REP_ERR_POLICY),
            (OPT_LIST, vec![1], REP_ERR_INVALID),
            (OPT_STRUCTURED_REPLY, vec![1], REP_ERR_INVALID),
            (OPT_SET_META_CONTEXT, meta(b"disk", &[]), REP_ERR_INVALID),
            (OPT_LIST_META_CONTEXT, huge_name, REP_ERR_INVALID),
            (OPT_LIST_META_CONTEXT, huge_count, REP_ERR_INVALID),
            (OPT_LIST_META_CONTEXT, meta(b"disk", &[&[b'a'; 4097]]), REP_ERR_INVALID),
            (5, vec![], REP_ERR_UNSUP),
            (77, vec![0; 100], REP_ERR_UNSUP),
            (77, vec![0; 100_000], REP_ERR_TOO_BIG),
        ] {
            let (kinds, step, _) = run(&client(&[option(code, &data), option(OPT_LIST, &[])]));
            assert_eq!(kinds, [error, REP_SERVER, REP_ACK], "{code} {} bytes", data.len());
            assert_eq!(step, Step::NeedMore);
        }
    }

    #[test]
    fn export_name_answers_with_or_without_zeroes() {
        for (flags, length) in [(1, 134), (3, 10), (0, 134)] {
            let (mut negotiation, mut out) = (Negotiation::new(), Vec::new());
            let input = [vec![0, 0, 0, flags], option(OPT_EXPORT_NAME, b"disk")].concat();
            assert_eq!(negotiation.feed(&input, &One, &mut out), (4, Step::Again));
            let (_, step) = negotiation.feed(&input[4..], &One, &mut out);
            assert!(matches!(step, Step::Transmit(_)));
            assert_eq!(out.len(), length);
        }
    }

    #[test]
    fn what_cannot_be_answered_ends_the_connection() {
        let mut wrong = option(OPT_LIST, &[]);
        wrong[0] ^= 1;
        let mut endless = option(77, &[]);
        endless[12..16].copy_from_slice(&[255; 4]);
        for input in [
            vec![0, 0, 0, 4],
            client(&[wrong]),
            client(&[endless]),
            client(&[option(OPT_EXPORT_NAME, b"nodisk")]),
            client(&[option(OPT_EXPORT_NAME, &[b'a'; 70_000])]),
            [vec![0, 0, 0, 0], option(OPT_LIST, &[])].concat(),
        ] {
            assert!(matches!(run(&input).1, Step::Close(reason) if !reason.is_empty()));
        }
        let (kinds, step, _) = run(&client(&[option(OPT_ABORT, &[1, 2])]));
        assert_eq!((kinds, step), (vec![REP_ACK], Step::Close("")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_as_promised(input in prop::collection::vec(any::<u8>(), 0..256)) {
            run(&input);
        }

        #[test]
        fn any_options_are_taken_as_promised(
            options in prop::collection::vec(
                (0u32..12, prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..40)), 0..6,
            ),
            cut in 0usize..400,
        ) {
            let options: Vec<_> = options.iter().map(|(code, data)| option(*code, data)).collect();
            let input = client(&options);
            run(&input[..cut.min(input.len())]);
        }
    }
}
