//! Which translators keep code of a page, which show it writable, and how they tell each other.
//!
//! A translator *claims* a page as code before it reads the bytes it translates, and as writable before stores of translated
//! code, which nobody sees, can reach it. Both are bits of the page's one state word:
//!
//! * A page is claimed for writing only while nobody claims it as code.
//! * Whoever claims it as code asks the others to give up writing, and reads no byte before the last has: see
//!   [`Claims::claim_code`]. Nobody waits: until then its code is interpreted.
//! * Everybody else's stores go through [`Pages::wrote`], after the store. It leaves a notice with each translator that
//!   claims the page as code, and gets the translator's attention. The notice says which parts of the page were written, so
//!   that code beside data stays; the claim ends when the translator has no code of the page left. So whenever it has blocks
//!   of a page, its claim stands, and where they are stale a notice waits.
//!
//! A translator looks at its notices when it begins to run, when it is asked for attention, and after every instruction that
//! it gives to the interpreter core; all serializing instructions are among those. One that is not running has promised to
//! look before it does, so that what it holds can be taken away without it.
//!
//! Store and load of the two sides are ordered by full barriers: the writer's between its store and its look at the
//! state, the translator's by the read-modify-write that makes the claim. One of them sees the other.

use crate::addr::{PAGE_SHIFT, PAGE_SIZE, RamOffset};
use crate::guest::GuestMemory;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard};

/// Translators that one memory serves at a time.
pub const MAX_TRANSLATORS: usize = 31;

/// Claims as code: a bit for each translator.
const CODE: u64 = (1 << MAX_TRANSLATORS) - 1;
/// Claims for writing, above them.
const WRITERS: u64 = CODE << MAX_TRANSLATORS;
/// The page was written since the dirty log was last taken.
const DIRTY: u64 = 1 << 63;

const fn code(slot: usize) -> u64 {
    1 << slot
}

const fn writer(slot: usize) -> u64 {
    1 << (MAX_TRANSLATORS + slot)
}

/// Told that notices wait; called on the thread of whoever left them, only while the translator runs.
pub trait CodeWatcher: Send + Sync {
    /// [`Claims::take_notices`] has something.
    fn code_written(&self);
}

/// What a translator must do about a page, given by its first byte.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Notice {
    /// It was written: what was translated from these of its parts is stale. A bit for each 64 bytes.
    Written(RamOffset, u64),
    /// Another translator takes code from it: stop showing it writable, then [`Claims::release_write`].
    Revoke(RamOffset),
}

#[derive(Default)]
struct Mail {
    written: BTreeMap<RamOffset, u64>,
    revoke: BTreeSet<RamOffset>,
    running: bool,
    watcher: Option<Box<dyn CodeWatcher>>,
}

#[derive(Default)]
struct Slot {
    pending: AtomicBool,
    mail: Mutex<Mail>,
}

impl Slot {
    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().expect("notices")
    }
}

/// The state of every page of the backing, and the translators' mail.
pub(crate) struct Pages {
    states: Box<[AtomicU64]>,
    slots: [Slot; MAX_TRANSLATORS],
    taken: Mutex<u32>,
}

impl Pages {
    pub(crate) fn new(count: u64) -> Pages {
        Pages {
            states: (0..count).map(|_| AtomicU64::new(0)).collect(),
            slots: Default::default(),
            taken: Mutex::new(0),
        }
    }

    fn state(&self, page: u64) -> &AtomicU64 {
        &self.states[page as usize]
    }

    /// `len` bytes at `at`, more than none, were stored.
    #[inline]
    pub(crate) fn wrote(&self, at: RamOffset, len: u64) {
        fence(Ordering::SeqCst);
        for page in (at.0 >> PAGE_SHIFT)..=((at.0 + len - 1) >> PAGE_SHIFT) {
            let state = self.state(page);
            let seen = state.load(Ordering::Relaxed);
            if seen & DIRTY == 0 {
                state.fetch_or(DIRTY, Ordering::Relaxed);
            }
            if seen & CODE != 0 {
                self.tell(page, seen & CODE, parts(page, at, len));
            }
        }
    }

    #[cold]
    fn tell(&self, page: u64, translators: u64, parts: u64) {
        for slot in members(translators) {
            self.post(slot, Notice::Written(RamOffset(page << PAGE_SHIFT), parts));
        }
    }

    /// Leaves a notice, and takes away what it is about if the translator does not run. Under the slot's lock, so that a claim
    /// made after the notice was taken is not lost.
    fn post(&self, slot: usize, notice: Notice) {
        let s = &self.slots[slot];
        let mut mail = s.mail();
        let running = mail.running;
        let (page, lost) = match notice {
            Notice::Written(page, parts) => {
                *mail.written.entry(page).or_default() |= if running { parts } else { u64::MAX };
                (page, code(slot))
            }
            Notice::Revoke(page) => {
                mail.revoke.insert(page);
                (page, writer(slot))
            }
        };
        s.pending.store(true, Ordering::SeqCst);
        if !running {
            self.state(page.0 >> PAGE_SHIFT).fetch_and(!lost, Ordering::SeqCst);
        } else if let Some(watcher) = &mail.watcher {
            // It may be running that code, or be storing: it gives up itself.
            watcher.code_written();
        }
    }

    /// Whether any translator claims the page as code.
    pub(crate) fn has_code(&self, page: u64) -> bool {
        self.state(page).load(Ordering::SeqCst) & CODE != 0
    }

    /// Numbers of the dirty pages, which are so no longer, but for those that may be written unseen.
    pub(crate) fn take_dirty(&self) -> impl Iterator<Item = u64> + '_ {
        let clean =
            |seen| (seen & DIRTY != 0).then_some(if seen & WRITERS == 0 { seen & !DIRTY } else { seen });
        let was_dirty =
            move |s: &AtomicU64| s.fetch_update(Ordering::SeqCst, Ordering::SeqCst, clean).is_ok();
        self.states.iter().enumerate().filter(move |(_, s)| was_dirty(s)).map(|(page, _)| page as u64)
    }

    fn attach(&self, watcher: Box<dyn CodeWatcher>) -> Option<usize> {
        let mut taken = self.taken.lock().expect("slots");
        let slot = taken.trailing_ones() as usize;
        if slot >= MAX_TRANSLATORS {
            return None;
        }
        *taken |= 1 << slot;
        *self.slots[slot].mail() = Mail { watcher: Some(watcher), ..Mail::default() };
        self.slots[slot].pending.store(false, Ordering::SeqCst);
        Some(slot)
    }

    fn detach(&self, slot: usize) {
        *self.slots[slot].mail() = Mail::default();
        let own = code(slot) | writer(slot);
        for state in self.states.iter().filter(|s| s.load(Ordering::SeqCst) & own != 0) {
            state.fetch_and(!own, Ordering::SeqCst);
        }
        *self.taken.lock().expect("slots") &= !(1 << slot);
    }
}

/// Which sixty-fourths of page number `page` hold some of the `len` bytes from `at` on; some do.
fn parts(page: u64, at: RamOffset, len: u64) -> u64 {
    let start = page << PAGE_SHIFT;
    let from = at.0.max(start) - start;
    let last = (at.0 + len - 1).min(start | (PAGE_SIZE - 1)) - start;
    u64::MAX << (from / PART) & u64::MAX >> (63 - last / PART)
}

/// Bytes of a part of a page.
const PART: u64 = PAGE_SIZE / 64;

/// Numbers of the bits that are set.
fn members(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        (lowest < u64::BITS).then_some(lowest as usize)
    })
}

/// A translator's place among those that share a memory; all its claims end when dropped.
pub struct Claims {
    memory: GuestMemory,
    slot: usize,
}

impl Claims {
    pub(crate) fn new(memory: &GuestMemory, watcher: Box<dyn CodeWatcher>) -> Option<Claims> {
        let slot = memory.pages().attach(watcher)?;
        Some(Claims { memory: memory.clone(), slot })
    }

    fn pages(&self) -> &Pages {
        self.memory.pages()
    }

    fn state(&self, page: RamOffset) -> &AtomicU64 {
        self.pages().state(page.0 >> PAGE_SHIFT)
    }

    /// From now on translated code may run, as soon as the notices are obeyed.
    pub fn enter(&self) {
        self.pages().slots[self.slot].mail().running = true;
    }

    /// Translated code runs no more until [`Self::enter`].
    pub fn leave(&self) {
        self.pages().slots[self.slot].mail().running = false;
    }

    /// Whether notices wait.
    #[inline]
    pub fn has_notices(&self) -> bool {
        self.pages().slots[self.slot].pending.load(Ordering::Acquire)
    }

    /// Takes the notices, each page once for each kind.
    pub fn take_notices(&self) -> impl Iterator<Item = Notice> + use<> {
        let slot = &self.pages().slots[self.slot];
        let mut mail = slot.mail();
        slot.pending.store(false, Ordering::SeqCst);
        let written = std::mem::take(&mut mail.written).into_iter();
        let revoke = std::mem::take(&mut mail.revoke).into_iter();
        written.map(|(page, parts)| Notice::Written(page, parts)).chain(revoke.map(Notice::Revoke))
    }

    /// Claims the page of `at` as code, and gives up writing it: the caller has revoked its own entries, or does so
    /// before it goes on. True once nobody may write it unseen: its bytes may be read. Otherwise those who may were asked to
    /// stop; the answer changes when they have.
    pub fn claim_code(&self, at: RamOffset) -> bool {
        let (own, state) = (writer(self.slot), self.state(at));
        state.fetch_and(!own, Ordering::SeqCst);
        let others = state.fetch_or(code(self.slot), Ordering::SeqCst) & WRITERS;
        if others == 0 {
            return true;
        }
        for slot in members(others >> MAX_TRANSLATORS) {
            self.pages().post(slot, Notice::Revoke(RamOffset(at.0 >> PAGE_SHIFT << PAGE_SHIFT)));
        }
        state.load(Ordering::SeqCst) & WRITERS == 0
    }

    /// Whether this translator claims the page of `at` as code.
    #[inline]
    pub fn has_code(&self, at: RamOffset) -> bool {
        self.state(at).load(Ordering::SeqCst) & code(self.slot) != 0
    }

    /// No view of this translator writes any page any more.
    pub fn release_all_writing(&self) {
        let own = writer(self.slot);
        for state in self.pages().states.iter().filter(|s| s.load(Ordering::SeqCst) & own != 0) {
            state.fetch_and(!own, Ordering::SeqCst);
        }
    }

    /// This translator has no code of the page any more.
    pub fn release_code(&self, at: RamOffset) {
        self.state(at).fetch_and(!code(self.slot), Ordering::SeqCst);
    }

    /// Claims the page of `at` for stores that nobody sees, and marks it dirty; false if somebody has code of it.
    #[inline]
    pub fn claim_write(&self, at: RamOffset) -> bool {
        let state = self.state(at);
        let wanted = writer(self.slot) | DIRTY;
        let claim = |seen| (seen & CODE == 0).then_some(seen | wanted);
        let seen = state.load(Ordering::SeqCst);
        seen & (CODE | wanted) == wanted
            || state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim).is_ok()
    }

    /// No entry shows the page writable any more.
    pub fn release_write(&self, at: RamOffset) {
        self.state(at).fetch_and(!writer(self.slot), Ordering::SeqCst);
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        self.pages().detach(self.slot);
    }
}

impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claims").field("slot", &self.slot).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PhysAddr;
    use crate::guest::MemoryConfig;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    const PAGE: RamOffset = RamOffset(0x3000);

    #[derive(Clone, Default)]
    struct Bell(Arc<AtomicU32>);

    impl CodeWatcher for Bell {
        fn code_written(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory")
    }

    fn claims(m: &GuestMemory) -> (Claims, Bell) {
        let bell = Bell::default();
        let claims = Claims::new(m, Box::new(bell.clone())).expect("a slot");
        claims.enter();
        (claims, bell)
    }

    fn notices(c: &Claims) -> Vec<Notice> {
        let pending = c.has_notices();
        let all: Vec<_> = c.take_notices().collect();
        assert_eq!(pending, !all.is_empty());
        all
    }

    fn store(m: &GuestMemory) {
        m.write(PhysAddr(0x3FFF), &[0; 2]).expect("RAM");
    }

    #[test]
    fn a_write_is_told_to_everyone_with_code_once() {
        let m = memory();
        let ((a, bell), (b, _), (c, silent)) = (claims(&m), claims(&m), claims(&m));
        assert!(a.claim_code(PAGE) && b.claim_code(PAGE));
        store(&m);
        store(&m);
        assert!(bell.0.load(Ordering::SeqCst) > 0 && silent.0.load(Ordering::SeqCst) == 0);
        assert!(a.has_code(PAGE), "other code of the page is as it was");
        let notice = Notice::Written(PAGE, 1 << 63);
        assert_eq!((notices(&a), notices(&b)), (vec![notice], vec![notice]));
        assert_eq!((notices(&a), notices(&c)), (vec![], vec![]));
    }

    #[test]
    fn notices_add_up_what_was_written() {
        let m = memory();
        let (a, _) = claims(&m);
        assert!(a.claim_code(PAGE) && a.claim_code(RamOffset(0x4000)));
        m.write(PhysAddr(0x3000), &[0; 64]).expect("RAM");
        m.write(PhysAddr(0x307F), &[0; 2]).expect("RAM");
        m.write(PhysAddr(0x3FC0), &[0; 65]).expect("RAM");
        assert_eq!(
            notices(&a),
            [Notice::Written(PAGE, 0b111 | 1 << 63), Notice::Written(RamOffset(0x4000), 1)]
        );
        m.write(PhysAddr(0x2FFF), &[0; 0x1002]).expect("RAM");
        assert_eq!(notices(&a), [Notice::Written(PAGE, u64::MAX), Notice::Written(RamOffset(0x4000), 1)]);
    }

    #[test]
    fn who_does_not_run_loses_a_page_with_the_first_write() {
        let m = memory();
        let ((a, bell), (b, _)) = (claims(&m), claims(&m));
        assert!(a.claim_code(PAGE));
        a.leave();
        store(&m);
        assert!(b.claim_write(PAGE));
        assert_eq!(bell.0.load(Ordering::SeqCst), 0);
        a.enter();
        assert_eq!(notices(&a)[0], Notice::Written(PAGE, u64::MAX), "what was written since is not known");
    }

    #[test]
    fn nobody_writes_what_somebody_has_code_of() {
        let m = memory();
        let ((a, _), (b, _)) = (claims(&m), claims(&m));
        assert!(a.claim_code(PAGE));
        assert!(!a.claim_write(PAGE) && !b.claim_write(PAGE));
        store(&m);
        assert!(!b.claim_write(PAGE), "the claim stands until there is no code");
        a.release_code(PAGE);
        assert!(b.claim_write(PAGE));
    }

    #[test]
    fn code_waits_for_those_who_write() {
        let m = memory();
        let ((a, _), (b, bell)) = (claims(&m), claims(&m));
        assert!(b.claim_write(PAGE) && a.claim_write(PAGE));
        assert!(!a.claim_code(PAGE) && !a.claim_code(PAGE));
        assert!(bell.0.load(Ordering::SeqCst) > 0);
        assert_eq!(notices(&b), [Notice::Revoke(PAGE)]);
        b.release_write(PAGE);
        assert!(a.claim_code(PAGE));
        assert_eq!(notices(&a), []);
    }

    #[test]
    fn who_does_not_run_is_not_waited_for() {
        let m = memory();
        let ((a, _), (b, bell)) = (claims(&m), claims(&m));
        assert!(b.claim_write(PAGE));
        b.leave();
        assert!(a.claim_code(PAGE));
        assert_eq!(bell.0.load(Ordering::SeqCst), 0);
        b.enter();
        assert_eq!(notices(&b), [Notice::Revoke(PAGE)]);
    }

    #[test]
    fn two_that_want_each_others_pages_both_get_them() {
        let m = memory();
        let ((a, _), (b, _)) = (claims(&m), claims(&m));
        let other = RamOffset(0x5000);
        assert!(a.claim_write(PAGE) && b.claim_write(other));
        assert!(!a.claim_code(other) && !b.claim_code(PAGE));
        for (c, page) in [(&a, PAGE), (&b, other)] {
            assert_eq!(notices(c), [Notice::Revoke(page)]);
            c.release_write(page);
        }
        assert!(a.claim_code(other) && b.claim_code(PAGE));
    }

    #[test]
    fn what_may_be_written_unseen_stays_dirty() {
        let m = memory();
        let (a, _) = claims(&m);
        assert!(a.claim_write(PAGE));
        m.write(PhysAddr(0x8000), &[1]).expect("RAM");
        assert_eq!(m.take_dirty().len(), 2);
        assert_eq!(m.take_dirty(), [PhysAddr(PAGE.0).page()]);
        a.release_write(PAGE);
        assert_eq!((m.take_dirty().len(), m.take_dirty().len()), (1, 0));
        assert!(a.claim_write(PAGE) && a.claim_write(RamOffset(0x8000)));
        a.release_all_writing();
        assert!(m.take_dirty_ram().len() <= 2 && m.take_dirty_ram().is_empty());
    }

    #[test]
    fn claims_end_with_their_owner_and_slots_come_back() {
        let m = memory();
        let ((a, _), (b, _)) = (claims(&m), claims(&m));
        assert!(b.claim_write(PAGE) && b.claim_code(RamOffset(0x4000)));
        drop(b);
        assert!(a.claim_code(PAGE));
        assert!(a.claim_write(RamOffset(0x4000)));
        let all: Vec<_> = (1..MAX_TRANSLATORS).map(|_| claims(&m)).collect();
        assert!(Claims::new(&m, Box::new(Bell::default())).is_none());
        drop(all);
        assert!(Claims::new(&m, Box::new(Bell::default())).is_some());
    }
}
