//! Statistics: what the translator counts, and the names the counters are reported by.

use super::Translator;

/// What the translator counts.
#[derive(Default, Debug)]
pub(super) struct Stats {
    pub(super) blocks: u64,
    pub(super) instructions: u64,
    pub(super) guest_bytes: u64,
    pub(super) code_bytes: u64,
    pub(super) rebased_pages: u64,
    pub(super) rebased: u64,
    pub(super) links: u64,
    pub(super) traces: u64,
    pub(super) link_exits: u64,
    pub(super) indirect_exits: u64,
    pub(super) interpreted: u64,
    pub(super) attention_exits: u64,
    pub(super) misses: u64,
    pub(super) miss_crossing: u64,
    pub(super) miss_fault: u64,
    pub(super) miss_mmio: u64,
    pub(super) miss_code: u64,
    pub(super) miss_soft: u64,
    pub(super) host_faults: u64,
    pub(super) invalidated: u64,
    pub(super) code_waits: u64,
    pub(super) revocations: u64,
    pub(super) cache_flushes: u64,
    pub(super) translation_flushes: u64,
    pub(super) page_flushes: u64,
    pub(super) space_switches: u64,
    pub(super) spaces_replaced: u64,
    pub(super) window_faults: u64,
    /// Those that probed a region that was not admitted.
    pub(super) window_probes: u64,
}

impl Translator {
    /// All counters by name: the translator's, the core's, and interpreted instructions by mnemonic.
    pub(super) fn collect_counters(&self) -> Vec<(String, u64)> {
        let s = &self.stats;
        let own = [
            ("blocks_translated", s.blocks),
            ("instructions_translated", s.instructions),
            ("guest_bytes_translated", s.guest_bytes),
            ("code_bytes", s.code_bytes),
            ("code_cache_used", self.cache.used() as u64),
            ("pages_rebased", s.rebased_pages),
            ("blocks_rebased", s.rebased),
            ("links", s.links),
            ("traces", s.traces),
            ("link_exits", s.link_exits),
            ("indirect_exits", s.indirect_exits),
            ("interpreted_instructions", s.interpreted),
            ("attention_exits", s.attention_exits),
            ("delta_misses", s.misses),
            ("delta_miss_crossing", s.miss_crossing),
            ("delta_miss_fault", s.miss_fault),
            ("delta_miss_mmio", s.miss_mmio),
            ("delta_miss_code", s.miss_code),
            ("delta_miss_soft", s.miss_soft),
            ("delta_fills", self.delta.fills),
            ("delta_table_pages", self.delta.pages()),
            ("host_faults", s.host_faults),
            ("blocks_invalidated", s.invalidated),
            ("code_page_waits", s.code_waits),
            ("write_revocations", s.revocations),
            ("code_cache_flushes", s.cache_flushes),
            ("translation_flushes", s.translation_flushes),
            ("page_flushes", s.page_flushes),
            ("space_switches", s.space_switches),
            ("spaces_replaced", s.spaces_replaced),
            ("windows_opened", self.windows.opened),
            ("window_pages", self.windows.shown),
            ("window_faults", s.window_faults),
            ("window_probes", s.window_probes),
            ("window_comparisons", self.windows.compared),
        ];
        let interpreted = iced_x86::Mnemonic::values()
            .zip(&self.interpreted)
            .filter(|&(_, &n)| n > 0)
            .map(|(m, &n)| (format!("interpreted.{m:?}").to_lowercase(), n));
        let core = self.core.counters();
        own.into_iter().chain(core).map(|(name, n)| (name.to_owned(), n)).chain(interpreted).collect()
    }
}
