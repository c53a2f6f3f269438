//! Bytes from a client: the negotiation never panics, never takes more than it was given and never
//! stands still; requests are parsed or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thinply::nbd::proto::{
    Catalog, Description, Negotiation, REQUEST_LENGTH, Refused, Request, Step, Terms,
};

struct One;

impl Catalog for One {
    type Export = ();

    fn find(&self, name: &str) -> Result<(), Refused> {
        if name.is_empty() || name == "one" { Ok(()) } else { Err(Refused::Unknown) }
    }

    fn look(&self, name: &str) -> Result<Description, Refused> {
        self.find(name).map(|()| self.describe(&()))
    }

    fn describe(&self, (): &()) -> Description {
        Description {
            name: "one".into(),
            description: "an export".into(),
            size: 1 << 40,
            multi_conn: true,
            read_only: false,
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![("one".into(), "an export".into())]
    }
}

fuzz_target!(|input: &[u8]| {
    let mut negotiation = Negotiation::new();
    let mut rest = input;
    let mut out = Vec::new();
    let structured = loop {
        let before = rest.len();
        let (taken, step) = negotiation.feed(rest, &One, &mut out);
        rest = &rest[taken..];
        match step {
            Step::NeedMore | Step::Close(_) => return,
            Step::Again => assert!(rest.len() < before, "a step took nothing"),
            Step::Transmit(session) => break session.structured,
        }
        out.clear();
    };
    let terms = Terms { size: 1 << 40, read_only: false, structured, allocation: structured };
    while let Ok(Some(request)) = Request::parse(rest, &terms) {
        let Some(after) = rest.get(REQUEST_LENGTH + request.payload as usize..) else { return };
        rest = after;
    }
});
