//! The numbers of the protocol, under its own names without `NBD_`. Server and client have them
//! from here; what checks both from outside (`tests`) has its own.

// Magic numbers.
/// Begins a greeting: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Ends a greeting, and begins an option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins an answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

// Handshake flags of the server, client flags with the same bits.
/// Options that are not known get an answer.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// No padding behind the answer to `OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

// Options.
/// Take an export; there is no way to say no but to hang up.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Hang up.
pub const OPT_ABORT: u32 = 2;
/// Name the exports.
pub const OPT_LIST: u32 = 3;
/// Tell of an export.
pub const OPT_INFO: u32 = 6;
/// Take an export, and tell of it.
pub const OPT_GO: u32 = 7;
/// Use structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Name the metadata contexts of an export.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Choose metadata contexts of an export.
pub const OPT_SET_META_CONTEXT: u32 = 10;

// Answers to options.
/// Done; the last answer.
pub const REP_ACK: u32 = 1;
/// An export.
pub const REP_SERVER: u32 = 2;
/// A fact of an export.
pub const REP_INFO: u32 = 3;
/// A metadata context and its id.
pub const REP_META_CONTEXT: u32 = 4;
/// The bit of all errors.
pub const REP_FLAG_ERROR: u32 = 1 << 31;
/// An option that is not known.
pub const REP_ERR_UNSUP: u32 = REP_FLAG_ERROR | 1;
/// This client may not.
pub const REP_ERR_POLICY: u32 = REP_FLAG_ERROR | 2;
/// A malformed option.
pub const REP_ERR_INVALID: u32 = REP_FLAG_ERROR | 3;
/// There is no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_FLAG_ERROR | 6;
/// An option too long to look at.
pub const REP_ERR_TOO_BIG: u32 = REP_FLAG_ERROR | 9;

// Facts of an export.
/// Size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// The name it goes by.
pub const INFO_NAME: u16 = 1;
/// A line for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Which blocks it serves, and which best.
pub const INFO_BLOCK_SIZE: u16 = 3;

// Transmission flags.
/// There are flags.
pub const FLAG_HAS_FLAGS: u16 = 1;
/// Changes are refused.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// There is `CMD_FLUSH`.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// There is `CMD_FLAG_FUA`.
pub const FLAG_SEND_FUA: u16 = 1 << 3;
/// There is `CMD_TRIM`.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// There is `CMD_WRITE_ZEROES`.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// There is `CMD_FLAG_DF`.
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// Several connections may use it at a time.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// There is `CMD_CACHE`.
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
/// There is `CMD_FLAG_FAST_ZERO`.
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

// Commands.
/// Read.
pub const CMD_READ: u16 = 0;
/// Write the payload.
pub const CMD_WRITE: u16 = 1;
/// Hang up.
pub const CMD_DISC: u16 = 2;
/// Make what was replied to durable.
pub const CMD_FLUSH: u16 = 3;
/// Give a range back.
pub const CMD_TRIM: u16 = 4;
/// Bring a range into memory.
pub const CMD_CACHE: u16 = 5;
/// Make a range zeros.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Describe a range.
pub const CMD_BLOCK_STATUS: u16 = 7;

// Flags of commands.
/// Reply once the change is durable.
pub const CMD_FLAG_FUA: u16 = 1;
/// Keep space for the zeros.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Do not split the answer.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Describe one extent.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Rather fail than be slow.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

// Structured replies.
/// The last chunk.
pub const REPLY_FLAG_DONE: u16 = 1;
/// Nothing.
pub const REPLY_TYPE_NONE: u16 = 0;
/// Bytes and where they stand.
pub const REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// A range of zeros.
pub const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Extents in a metadata context.
pub const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// The bit of all errors.
pub const REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;
/// The request failed.
pub const REPLY_TYPE_ERROR: u16 = REPLY_TYPE_FLAG_ERROR | 1;
/// The request failed, and where.
pub const REPLY_TYPE_ERROR_OFFSET: u16 = REPLY_TYPE_FLAG_ERROR | 2;

// States of extents in `base:allocation`.
/// Takes no space.
pub const STATE_HOLE: u32 = 1;
/// Reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;

/// The metadata context that tells what is allocated.
pub const ALLOCATION_NAME: &str = "base:allocation";
