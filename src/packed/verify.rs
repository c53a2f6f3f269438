//! Verifying a whole packed layer: every byte of the file is looked at once.

use std::sync::Arc;

use super::Packed;
use super::part::Part;
use crate::error::{Error, ErrorKind, Result};
use crate::format::packed::{CHUNK_FRAMES, Entry, HEADER_SIZE, Map};
use crate::types::{BLOCK_SIZE, Block, GROUP_BYTES, Word, runs};

/// Something that is not as it was packed.
#[derive(Clone, Debug)]
pub struct Damage {
    /// The guest bytes that can't be read because of it, as offset and length; none where the
    /// damage is in padding.
    pub guest: Option<(u64, u64)>,
    /// What is wrong, with file and offset.
    pub error: Error,
}

/// What [`Packed::verify`] says while it works.
pub trait Watch {
    /// Something is wrong.
    fn found(&mut self, damage: Damage);

    /// That many data blocks more have been verified.
    fn verified(&mut self, _blocks: u64) {}
}

/// Collects what is wrong.
impl Watch for Vec<Damage> {
    fn found(&mut self, damage: Damage) {
        self.push(damage);
    }
}

impl Packed {
    /// Reads every byte of the file and tells `watch` what is wrong: frames against their hashes,
    /// blocks against their checksums, maps and chunks against the root, padding against zero.
    /// Header, footer and directory were verified by the open.
    ///
    /// # Errors
    /// Host errors, which end the verification.
    pub fn verify(&self, watch: &mut dyn Watch) -> Result<()> {
        let (mut end, mut present) = (HEADER_SIZE, 0);
        for (place, entry) in self.entries().iter().enumerate() {
            let guest = (entry.group.first_word().guest_offset(), GROUP_BYTES);
            let map = tell(watch, Some(guest), self.read_map(place, entry))?;
            if let Some(map) = map {
                present += map.present.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
                tell(watch, None, self.check_gap(end, map.frames_offset))?;
                self.verify_group(place, entry, &map, watch)?;
            }
            end = entry.map_offset + u64::from(entry.map_length);
        }
        let footer = self.footer();
        if end != footer.directory_offset {
            let detail = "bytes between the last map and the directory".to_owned();
            watch.found(Damage { guest: None, error: self.corrupt(detail, end) });
        }
        let data: u64 = self.entries().iter().map(|entry| u64::from(entry.data_blocks)).sum();
        if (footer.data_blocks, footer.data_blocks + footer.zero_blocks) != (data, present) {
            let detail = format!(
                "{} data and {} zero blocks, expected {data} and {}",
                footer.data_blocks,
                footer.zero_blocks,
                present.saturating_sub(data)
            );
            watch.found(Damage {
                guest: None,
                error: self.corrupt(detail, footer.directory_offset),
            });
        }
        Ok(())
    }

    /// Nothing but fewer than a block of zeros may stand before a group's frames.
    fn check_gap(&self, from: u64, to: u64) -> Result<()> {
        if to < from || to - from >= BLOCK_SIZE {
            return Err(self.corrupt(format!("frames that should begin at byte {from}"), to));
        }
        let mut gap = vec![0; (to - from) as usize];
        self.origin().read(from, &mut gap)?;
        match gap.iter().position(|&byte| byte != 0) {
            Some(place) => Err(self.corrupt("a byte in the padding".into(), from + place as u64)),
            None => Ok(()),
        }
    }

    /// Chunks and frames of a group, which must fill the room between its first frame and its map.
    fn verify_group(
        &self,
        place: usize,
        entry: &Entry,
        map: &Map,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let blocks: Vec<Block> = (entry.group.first_word().0..)
            .zip(map.data.iter())
            .flat_map(|(word, &data)| {
                runs(data).flat_map(move |(a, b)| (a..b).map(move |bit| Word(word).block(bit)))
            })
            .collect();
        let in_frame = self.header().frame_blocks as usize;
        let in_chunk = CHUNK_FRAMES as usize;
        let mut frames = blocks.chunks(in_frame);
        let (mut start, mut number, mut chunk_end) = (Some(0), 0, map.chunks_offset);
        for chunk_number in (0..).take(map.chunks.len()) {
            let blocks = || frames.clone().take(in_chunk).flatten();
            let guest = blocks().next().zip(blocks().last());
            let guest = guest.map(|(first, last)| span(first, last));
            let chunk = tell(watch, guest, self.read_chunk(place, map, chunk_number))?;
            chunk_end += self.chunk_length(map, chunk_number);
            let Some(chunk) = chunk.map(Arc::new) else {
                frames.by_ref().take(in_chunk).for_each(drop);
                (start, number) = (None, number + CHUNK_FRAMES);
                continue;
            };
            for (frame, blocks) in chunk.frames.iter().zip(frames.by_ref()) {
                match start {
                    Some(start) => {
                        let stored = (start, frame.end);
                        let part = self.frame_part(map, chunk.clone(), number, stored);
                        self.verify_frame(place, map, part, blocks, watch)?;
                    }
                    // The chunk before says where it begins.
                    None => {
                        let detail = format!(
                            "frame {number} of group {} begins where a chunk that is damaged says",
                            map.group.0
                        );
                        let guest = blocks
                            .first()
                            .zip(blocks.last())
                            .map(|(first, last)| span(first, last));
                        let error = self.corrupt(detail, map.chunks_offset);
                        watch.found(Damage { guest, error });
                    }
                }
                watch.verified(blocks.len() as u64);
                (start, number) = (Some(frame.end), number + 1);
            }
        }
        let frames_end = start.map_or(map.chunks_offset, |end| map.frames_offset + u64::from(end));
        if (frames_end, chunk_end) != (map.chunks_offset, entry.map_offset) {
            let detail = format!("bytes of group {} that belong to nothing", entry.group.0);
            watch.found(Damage { guest: None, error: self.corrupt(detail, frames_end) });
        }
        Ok(())
    }

    fn verify_frame(
        &self,
        place: usize,
        map: &Map,
        part: Result<Part>,
        blocks: &[Block],
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let guest = blocks.first().zip(blocks.last()).map(|(first, last)| span(first, last));
        let Some(part) = tell(watch, guest, part)? else { return Ok(()) };
        let (bytes, unlike) = match self.decode(place, map, &part) {
            Ok(decoded) => (decoded, None),
            // Blocks that are stored as they are can be told apart by their checksums.
            Err(error) if error.kind() == ErrorKind::Corrupt && part.is_raw() => {
                let mut stored = vec![0; part.decoded as usize];
                self.origin().read(part.stored.0, &mut stored)?;
                (stored, Some(error))
            }
            Err(error) => return tell(watch, guest, Err::<(), _>(error)).map(drop),
        };
        let mut bad = 0;
        let expected = part.checksums(self.header());
        for ((block, bytes), expected) in
            blocks.iter().zip(bytes.chunks(BLOCK_SIZE as usize)).zip(expected)
        {
            let found = crc32fast::hash(bytes);
            if found != expected {
                let detail = format!(
                    "block {} has checksum {found:#010x}, expected {expected:#010x}",
                    block.0
                );
                let error = self.corrupt(detail, part.stored.0);
                watch.found(Damage { guest: Some(span(block, block)), error });
                bad += 1;
            }
        }
        if let Some(error) = unlike.filter(|_| bad == 0) {
            watch.found(Damage { guest, error });
        }
        Ok(())
    }
}

/// The value; what is corrupt is told to `watch` instead.
fn tell<T>(
    watch: &mut dyn Watch,
    guest: Option<(u64, u64)>,
    result: Result<T>,
) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            watch.found(Damage { guest, error });
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The guest bytes from one block to another, as offset and length.
fn span(first: &Block, last: &Block) -> (u64, u64) {
    (first.0 * BLOCK_SIZE, (last.0 + 1 - first.0) * BLOCK_SIZE)
}
