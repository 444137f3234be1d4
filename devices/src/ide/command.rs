//! The ATA command set (ATA/ATAPI-7, clause 6).

use super::channel::{Channel, Job, Kind};
use super::drive::{Address, MAX_MULTIPLE, MAX_TRIM_SECTORS};
use super::spec::{command as c, error, feature};

impl Channel {
    /// Runs command `code` on the present drive `unit`.
    pub(super) fn execute(&mut self, unit: usize, code: u8) {
        match code {
            c::READ_SECTORS | c::READ_SECTORS_NO_RETRY => self.transfer(unit, Kind::PioRead, false, 1),
            c::READ_SECTORS_EXT => self.transfer(unit, Kind::PioRead, true, 1),
            c::WRITE_SECTORS | c::WRITE_SECTORS_NO_RETRY => self.transfer(unit, Kind::PioWrite, false, 1),
            c::WRITE_SECTORS_EXT => self.transfer(unit, Kind::PioWrite, true, 1),
            c::READ_MULTIPLE => self.multiple(unit, Kind::PioRead, false),
            c::READ_MULTIPLE_EXT => self.multiple(unit, Kind::PioRead, true),
            c::WRITE_MULTIPLE => self.multiple(unit, Kind::PioWrite, false),
            c::WRITE_MULTIPLE_EXT => self.multiple(unit, Kind::PioWrite, true),
            c::READ_DMA | c::READ_DMA_NO_RETRY => self.transfer(unit, Kind::DmaRead, false, 1),
            c::READ_DMA_EXT => self.transfer(unit, Kind::DmaRead, true, 1),
            c::WRITE_DMA | c::WRITE_DMA_NO_RETRY => self.transfer(unit, Kind::DmaWrite, false, 1),
            c::WRITE_DMA_EXT => self.transfer(unit, Kind::DmaWrite, true, 1),
            c::READ_VERIFY | c::READ_VERIFY_NO_RETRY => self.transfer(unit, Kind::Verify, false, 1),
            c::READ_VERIFY_EXT => self.transfer(unit, Kind::Verify, true, 1),
            c::FLUSH_CACHE | c::FLUSH_CACHE_EXT => {
                self.start(Job { unit, kind: Kind::Flush, ext: false, lba: 0, left: 0, block: 1 });
            }
            c::DATA_SET_MANAGEMENT => self.data_set_management(unit),
            c::EXECUTE_DIAGNOSTIC => self.diagnose(),
            _ => self.execute_without_data(unit, code),
        }
    }

    fn execute_without_data(&mut self, unit: usize, code: u8) {
        let Some(d) = self.drives[unit].as_mut() else { return };
        let done = match code {
            c::IDENTIFY => {
                let data = d.identify();
                self.give(unit, &data);
                return;
            }
            c::SET_FEATURES => match d.regs.features[0] {
                feature::ENABLE_WRITE_CACHE => {
                    d.write_cache = true;
                    true
                }
                feature::DISABLE_WRITE_CACHE => {
                    d.write_cache = false;
                    // What was written before must be on the disk when this ends.
                    self.start(Job { unit, kind: Kind::Flush, ext: false, lba: 0, left: 0, block: 1 });
                    return;
                }
                feature::SET_TRANSFER_MODE => d.set_transfer_mode(d.regs.count[0]),
                feature::ENABLE_LOOK_AHEAD
                | feature::DISABLE_LOOK_AHEAD
                | feature::KEEP_SETTINGS
                | feature::REVERT_SETTINGS => true,
                _ => false,
            },
            c::SET_MULTIPLE => {
                let n = d.regs.count[0];
                let valid = n == 0 || (n <= MAX_MULTIPLE && n.is_power_of_two());
                d.multiple = if valid { n } else { 0 };
                valid
            }
            c::INITIALIZE_PARAMETERS => d.set_geometry(),
            c::READ_NATIVE_MAX | c::READ_NATIVE_MAX_EXT => {
                let ext = code == c::READ_NATIVE_MAX_EXT;
                let last = d.sectors() - 1;
                d.show_lba(if ext { last } else { last.min(0x0FFF_FFFF) }, ext);
                true
            }
            c::CHECK_POWER_MODE => {
                d.regs.count[0] = if d.standby { 0 } else { 0xFF };
                true
            }
            c::STANDBY | c::STANDBY_IMMEDIATE => {
                d.standby = true;
                true
            }
            c::IDLE | c::IDLE_IMMEDIATE => {
                d.standby = false;
                true
            }
            c::SLEEP => {
                (d.standby, d.sleeping) = (true, true);
                true
            }
            c::RECALIBRATE..=0x1F | c::SEEK..=0x7F => true,
            // NOP and DEVICE RESET are aborted by a disk without the PACKET feature set, as is all that is unknown.
            c::NOP | c::DEVICE_RESET => false,
            _ => false,
        };
        if done { self.succeed(unit) } else { self.fail(unit, error::ABRT) }
    }

    fn multiple(&mut self, unit: usize, kind: Kind, ext: bool) {
        match self.drives[unit].as_ref().map_or(0, |d| d.multiple) {
            0 => self.fail(unit, error::ABRT),
            n => self.transfer(unit, kind, ext, u32::from(n)),
        }
    }

    fn transfer(&mut self, unit: usize, kind: Kind, ext: bool, block: u32) {
        let Some(d) = self.drives[unit].as_mut() else { return };
        d.standby = false;
        let writes = matches!(kind, Kind::PioWrite | Kind::DmaWrite);
        let refused = writes && d.backend.read_only();
        match d.address(ext) {
            Address::NotFound => self.fail(unit, error::IDNF),
            Address::Range { .. } if refused => self.fail(unit, error::ABRT),
            Address::Range { lba, sectors } => self.start(Job { unit, kind, ext, lba, left: sectors, block }),
        }
    }

    fn data_set_management(&mut self, unit: usize) {
        let Some(d) = self.drives[unit].as_ref() else { return };
        let blocks = u32::from(u16::from_le_bytes(d.regs.count));
        let trim = d.regs.features[0] & 1 != 0;
        if !trim || !d.backend.can_discard() || blocks == 0 || blocks > MAX_TRIM_SECTORS {
            self.fail(unit, error::ABRT);
            return;
        }
        self.start(Job { unit, kind: Kind::Trim, ext: true, lba: 0, left: blocks, block: 1 });
    }
}
