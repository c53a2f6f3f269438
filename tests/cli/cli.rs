//! The command line, tested from outside: the contract that every subcommand keeps, and what each
//! of them does.

mod archives;
mod build;
mod contract;
mod derive;
mod disks;
mod flatten;
mod foreign;
mod help;
mod hosts;
mod kill;
mod layering;
mod layers;
mod locks;
mod logging;
mod nbd;
mod options;
mod packed;
mod races;
mod repair;
mod rights;
mod show;
mod store;
mod store_damage;
mod store_foreign;
mod store_kill;
mod store_limits;
mod store_lost;
mod store_readers;
mod store_root;
mod support;
mod walk;
