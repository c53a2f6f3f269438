//! What is done to the disks of a store as a whole, beside their users: typed requests and answers,
//! carried out over a [`Desk`], and a JSON line over a Unix socket to ask for them ([`mod@line`]).
//!
//! One process has a store's desk ([`Control::serving`]), ensured by a lock in the store. Whoever wants
//! something done asks that process first, and where there is none has it done in its own process, over
//! a desk of its own ([`carry_out`]); then the locks of the layers keep two such processes apart.
//!
//! A file system is looked into here ([`Request::Diff`]) and not by the caller, so that a front end's
//! process needs to hand nothing in and every transport can answer everything. Its reader is a small
//! library without unsafe code, and the store's feature brings it in.

mod changes;
mod files;
pub mod line;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::device::Device;
use crate::error::{ErrorKind, Result};
use crate::serve::{Broker, Desk, Listed, Log};
use crate::storage::{Access, Storage};
use crate::store::{DiskKind, DiskName, OpenDisk, Store, StoreBroker, now};

pub use changes::{Changes, Extent};
pub use files::{Change, FileChange};
pub use request::{Answer, DiskUse, Request, VERSION};

/// Carries requests out over the desk of a store. Clones share it.
#[derive(Clone)]
pub struct Control {
    desk: Desk<StoreBroker>,
    /// RFC 3339, for people.
    since: String,
    /// The store's desk is this one.
    lock: Option<Arc<dyn Storage>>,
}

impl Control {
    /// The desk of the process that serves `store`, which no other process can be then.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where another process is; host errors.
    pub fn serving(store: Store, log: Log) -> Result<Self> {
        let desk = store.take_desk()?;
        Ok(Self::with_desk(StoreBroker::new(store, log), desk))
    }

    /// [`Control::serving`] with what [`Store::take_desk`] gave to this process, or to one before it.
    pub fn with_desk(broker: StoreBroker, desk: Arc<dyn Storage>) -> Self {
        Self { lock: Some(desk), ..Self::over(broker) }
    }

    /// A desk beside those of other processes, for a single request.
    pub fn private(store: Store, log: Log) -> Self {
        Self::over(StoreBroker::new(store, log))
    }

    fn over(broker: StoreBroker) -> Self {
        Self { desk: Desk::new(broker), since: now(), lock: None }
    }

    /// The desk.
    pub fn desk(&self) -> &Desk<StoreBroker> {
        &self.desk
    }

    fn store(&self) -> &Store {
        self.desk.broker().store()
    }

    /// Carries a request out.
    ///
    /// # Errors
    /// Those of the store; nothing is done then, or what the store's own documentation says.
    pub fn carry_out(&self, request: &Request) -> Result<Answer> {
        match request {
            Request::Commit { container, image, comment } => {
                let image = image.parse()?;
                let made = self.change(&export(container), |disk| disk.commit(&image, comment))?;
                Ok(Answer::Commit { image: made.id })
            }
            Request::Snapshot { container, name } => {
                self.change(&export(container), |disk| disk.snapshot(name))?;
                Ok(Answer::Snapshot)
            }
            Request::Diff { container } => self.diff(container).map(Answer::Diff),
            Request::Resize { disk, size, shrink } => {
                let size = self.change(disk, |disk| {
                    disk.resize(*size, *shrink)?;
                    Ok(disk.size())
                })?;
                Ok(Answer::Resize { size })
            }
            Request::List {} => self.list().map(|disks| Answer::List { disks }),
            Request::Status {} => Ok(Answer::Status {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                since: self.since.clone(),
            }),
        }
    }

    /// Changes a disk as a whole, beside its users.
    fn change<T>(&self, name: &str, act: impl FnOnce(&OpenDisk) -> Result<T>) -> Result<T> {
        let served = self.desk.visit(name)?;
        let done = act(&served.change());
        // A refused change must not leave the layer marked as in use.
        let left = served.leave();
        let value = done?;
        left.map(|()| value)
    }

    /// What a container changed, its files as of one moment.
    fn diff(&self, container: &str) -> Result<Changes> {
        if self.lock.is_none() {
            // Nobody else may write it then, and it need not be opened for that.
            let disk = DiskName::new(DiskKind::Container, container)?;
            let disk = Arc::new(self.store().open_disk(&disk, Access::Read)?);
            return Changes::of(&disk, disk.clone());
        }
        let served = self.desk.visit(&export(container))?;
        let look = || {
            let disk = served.change();
            let moment = served.moment(self.desk.broker().scratch()?)?;
            Changes::of(&disk, Arc::new(moment))
        };
        let changes = look();
        let left = served.leave();
        let changes = changes?;
        left.map(|()| changes)
    }

    fn list(&self) -> Result<Vec<DiskUse>> {
        let in_use = self.desk.in_use();
        let disks =
            self.desk.broker().list()?.into_iter().map(|Listed { name, description, .. }| {
                let found = in_use.iter().find(|disk| disk.name == name);
                let (shared, users) = found.map_or((false, 0), |disk| (disk.shared, disk.users));
                let (writers, readers) = if shared { (0, users) } else { (users, 0) };
                let waiting = found.map_or(0, |disk| disk.waiting);
                DiskUse { name, description, writers, readers, waiting }
            });
        Ok(disks.collect())
    }
}

/// The name of a container's disk.
fn export(container: &str) -> String {
    format!("container/{container}")
}

/// Has a request carried out by the process that serves the store, or in this one where nobody does.
///
/// # Errors
/// Those of [`Control::carry_out`] and [`line::ask`].
pub fn carry_out(store: &Store, request: &Request, log: Log) -> Result<Answer> {
    if let Some(answer) = line::ask(store, request) {
        return answer;
    }
    match Control::private(store.clone(), log).carry_out(request) {
        // Somebody may have begun to serve it meanwhile.
        Err(error) if error.kind() == ErrorKind::InUse => {
            line::ask(store, request).unwrap_or(Err(error))
        }
        other => other,
    }
}
