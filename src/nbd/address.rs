//! Where an export is: NBD URIs.

use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// The port that a server has where a URI names none.
const PORT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket.
    Unix(PathBuf),
    /// Host and port, an IPv6 address in brackets.
    Tcp(String),
}

/// An export of a server, as an NBD URI names it: `nbd://HOST[:PORT]/[EXPORT]` or
/// `nbd+unix:///[EXPORT]?socket=PATH`. Reads from such a text, and shows as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Where the server listens.
    pub place: Place,
    /// The export's name; the empty one asks for a default.
    pub export: String,
}

impl FromStr for Address {
    type Err = Error;

    /// Fails with [`ErrorKind::InvalidInput`]. Parameters of a query other than `socket` are left
    /// alone.
    fn from_str(uri: &str) -> Result<Self, Error> {
        let wrong = || {
            let detail = "expected nbd://HOST[:PORT]/[EXPORT] or \
                          nbd+unix:///[EXPORT]?socket=PATH";
            Error::new(ErrorKind::InvalidInput, format!("{uri}: {detail}"))
        };
        let (scheme, rest) = uri.split_once("://").ok_or_else(wrong)?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export).and_then(|name| String::from_utf8(name).ok());
        let export = export.ok_or_else(wrong)?;
        let place = match scheme {
            "nbd" if !host.is_empty() && query.is_empty() => {
                let port = host.rsplit_once(':').filter(|(_, port)| !port.contains(']'));
                let full = if port.is_some() { host.into() } else { format!("{host}:{PORT}") };
                Place::Tcp(full)
            }
            "nbd+unix" if host.is_empty() => {
                let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
                let socket = socket.and_then(decode).ok_or_else(wrong)?;
                Place::Unix(OsString::from_vec(socket).into())
            }
            _ => return Err(wrong()),
        };
        Ok(Self { place, export })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = encode(self.export.as_bytes());
        match &self.place {
            Place::Unix(path) => {
                write!(f, "nbd+unix:///{name}?socket={}", encode(path.as_os_str().as_bytes()))
            }
            Place::Tcp(host) => write!(f, "nbd://{host}/{name}"),
        }
    }
}

/// Percent-encodes all but the unreserved characters of RFC 3986 and the slash.
fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(byte.into());
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            other => other,
        });
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_lead_somewhere_or_are_refused() {
        let address = |uri: &str| uri.parse::<Address>();
        let tcp = |host: &str| Place::Tcp(host.into());
        let unix = |path: &str| Place::Unix(path.into());
        for (uri, place, export) in [
            ("nbd://host", tcp("host:10809"), ""),
            ("nbd://host:1/disk", tcp("host:1"), "disk"),
            ("nbd://[::1]/a%20b/c", tcp("[::1]:10809"), "a b/c"),
            ("nbd://[::1]:7/", tcp("[::1]:7"), ""),
            ("nbd+unix:///?socket=/tmp/s", unix("/tmp/s"), ""),
            ("nbd+unix:///x?a=b&socket=/tmp/%2541", unix("/tmp/%41"), "x"),
        ] {
            let wanted = Address { place, export: export.into() };
            assert_eq!(address(uri).unwrap(), wanted);
            assert_eq!(address(&wanted.to_string()).unwrap(), wanted);
        }
        for uri in ["nbd://", "nbds://host", "nbd+unix:///x", "nbd+unix://h/?socket=/s"] {
            assert_eq!(address(uri).unwrap_err().kind(), ErrorKind::InvalidInput, "{uri}");
        }
        assert!(address("nbd://h/%f").is_err() && address("nbd://h/%ff").is_err());
        let bytes = OsString::from_vec(b"/s\xff".to_vec());
        let odd = Address { place: Place::Unix(bytes.into()), export: "ü&".into() };
        assert_eq!(odd.to_string(), "nbd+unix:///%C3%BC%26?socket=/s%FF");
        assert_eq!(address(&odd.to_string()).unwrap(), odd);
    }
}
