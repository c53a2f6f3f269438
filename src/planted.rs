//! Bugs planted on purpose, one at a time, for the crash simulator to find (`tests/crash/simulation.rs`).
//! Without `--cfg simulation` there are none, and nothing of this is compiled in.

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each name says it")]
pub enum Bug {
    RecordNotSynced,
    BitBeforeItsData,
    FreshBitInCheckpoint,
    ConfirmSkipped,
    ChecksumWithoutLock,
    FlushJoinsTheRunningOne,
    JoinedFlushAlwaysSucceeds,
    RingPlaceReusedEarly,
    FailedAttemptKeepsItsNumber,
    FailedSyncRetried,
    FailedSyncForgotten,
    FailedRecordKeepsItsBlocks,
    PunchAfterItsBit,
    BitBeforeItsWrite,
    NewestSlotOverwritten,
    LastRecordTrusted,
    CacheTrusted,
    EpochNotSynced,
    NameNotSynced,
    LeaseGivenTwice,
    MomentMissesABlock,
    FlushJoinedTooLate,
    CloseRacesAnOpen,
    ChangeOnAClosingDisk,
    MarkedAfterTheAnswer,
    AnsweredBeforeThePageCache,
    SettledBeforeItsSync,
    ResentOverANewerOne,
    LockFreeInTheGap,
    CopyUpWithoutStripe,
}

#[cfg(simulation)]
mod planting {
    use super::Bug;
    use std::sync::atomic::{AtomicUsize, Ordering};

    static PLANTED: AtomicUsize = AtomicUsize::new(usize::MAX);

    /// Plants a bug for the whole process, or takes it out.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.store(bug.map_or(usize::MAX, |bug| bug as usize), Ordering::SeqCst);
    }

    /// Whether this is the bug to have.
    pub fn planted(bug: Bug) -> bool {
        PLANTED.load(Ordering::SeqCst) == bug as usize
    }
}

#[cfg(simulation)]
pub use planting::{plant, planted};

/// Whether this is the bug to have.
#[cfg(not(simulation))]
#[inline]
pub const fn planted(_: Bug) -> bool {
    false
}
