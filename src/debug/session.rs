//! One debugger's session: packets in, stops out. Whatever the debugger sends, the guest lives on.

use super::link::{Event, Stop};
use super::listen::Shared;
use super::target::{self, Reason, Target};
use super::wire::{Frame, Framer, PACKET_MAX, Stream, Wire};
use crate::run::Request;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub};
use paravane_memory::VpIndex;
use std::io::Read;
use std::sync::mpsc::{self, Receiver, Sender};

type Machine = GdbStubStateMachine<'static, Target, Wire>;

/// Bytes of memory in one answer, in two digits each.
const PACKET_MEMORY: u64 = PACKET_MAX as u64 / 4;

/// The session is over.
pub(super) struct Over;

pub(super) struct Session<'a> {
    shared: &'a Shared,
    /// For a new stub, where a packet made the old one give up.
    stream: Stream,
    target: Target,
    /// The debugger's place in the protocol; `None` only inside a call.
    stub: Option<Machine>,
    ended: Option<u8>,
}

impl<'a> Session<'a> {
    /// Serves the debugger on `stream` until it leaves or the machine ends.
    pub(super) fn serve(stream: Stream, shared: &'a Shared) {
        let Ok(input) = stream.try_clone() else { return };
        let (sender, events) = mpsc::channel();
        let to_session = sender.clone();
        let reader = std::thread::Builder::new().name("gdb-input".into());
        if reader.spawn(move || read_all(input, &to_session)).is_err() {
            return;
        }
        shared.link.attach(sender);
        let target = Target::new(shared.link.clone(), shared.inspector.clone());
        let mut session = Session { shared, stream, target, stub: None, ended: None };
        let _over = session.run(&events);
        session.stream.close();
    }

    fn run(&mut self, events: &Receiver<Event>) -> Result<(), Over> {
        let mut framer = Framer::default();
        let mut early = Vec::new();
        // A debugger that connects finds the guest stopped.
        while self.stub.is_none() {
            match events.recv().map_err(|_| Over)? {
                Event::Bytes(bytes) => early.extend(bytes),
                Event::Hangup => return Err(Over),
                Event::Stopped(vp, stop) => {
                    self.target.stopped(vp, &stop);
                    self.restart()?;
                }
                Event::Ended(code) => {
                    self.ended = Some(code);
                    self.restart()?;
                }
            }
        }
        self.bytes(&mut framer, &early)?;
        loop {
            match events.recv().map_err(|_| Over)? {
                Event::Bytes(bytes) => self.bytes(&mut framer, &bytes)?,
                Event::Hangup => return Err(Over),
                Event::Stopped(vp, stop) => self.stopped(vp, &stop)?,
                Event::Ended(code) => self.ended = Some(code),
            }
            self.report_end()?;
        }
    }

    /// A stub at the beginning of the protocol.
    fn restart(&mut self) -> Result<(), Over> {
        let wire = Wire::new(self.stream.try_clone().map_err(|_| Over)?);
        let stub = GdbStub::builder(wire).packet_buffer_size(PACKET_MAX).build().map_err(|_| Over)?;
        self.stub = Some(stub.run_state_machine(&mut self.target).map_err(|_| Over)?);
        Ok(())
    }

    fn wire(&mut self) -> Result<&mut Wire, Over> {
        Ok(match self.stub.as_mut().ok_or(Over)? {
            GdbStubStateMachine::Idle(s) => s.borrow_conn(),
            GdbStubStateMachine::Running(s) => s.borrow_conn(),
            GdbStubStateMachine::CtrlCInterrupt(s) => s.borrow_conn(),
            GdbStubStateMachine::Disconnected(s) => s.borrow_conn(),
        })
    }

    fn bytes(&mut self, framer: &mut Framer, bytes: &[u8]) -> Result<(), Over> {
        for &byte in bytes {
            match framer.next(byte) {
                None => {}
                Some(Frame::Packet(packet)) => self.packet(&packet)?,
                Some(Frame::Interrupt) => self.interrupt(),
                Some(Frame::Damaged) => self.wire()?.byte(b'-').map_err(|_| Over)?,
                Some(Frame::TooLong) => self.refuse("the packet is too long")?,
            }
        }
        Ok(())
    }

    /// Ctrl-C. A stopped guest has said so already.
    fn interrupt(&mut self) {
        if matches!(self.stub, Some(GdbStubStateMachine::Running(_))) {
            self.shared.link.pause();
        }
    }

    fn refuse(&mut self, why: &str) -> Result<(), Over> {
        self.wire()?.packet(format!("E.{why}").as_bytes()).map_err(|_| Over)
    }

    fn packet(&mut self, packet: &[u8]) -> Result<(), Over> {
        let running = matches!(self.stub, Some(GdbStubStateMachine::Running(_)));
        let leaving = matches!(packet.get(1), Some(b'k' | b'D')) || packet.starts_with(b"$vKill");
        if running && !leaving {
            self.wire()?.byte(b'+').map_err(|_| Over)?;
            return self.refuse("the guest is running: interrupt it first");
        }
        self.target.follow_selection(packet);
        if wants_too_much(packet) {
            self.wire()?.byte(b'+').map_err(|_| Over)?;
            return self.refuse("that is more memory than a packet holds");
        }
        for &byte in packet {
            let next = match self.stub.take().ok_or(Over)? {
                GdbStubStateMachine::Idle(s) => s.incoming_data(&mut self.target, byte),
                GdbStubStateMachine::Running(s) => s.incoming_data(&mut self.target, byte),
                other => Ok(other),
            };
            match next {
                Ok(next) => self.stub = Some(next),
                Err(e) if e.is_connection_error() => return Err(Over),
                Err(e) => {
                    // The stub gave up on a packet that makes no sense: the debugger hears why, and may go on.
                    self.restart()?;
                    let text = e.to_string().replace(['#', '$', '}', '*'], " ");
                    return self.refuse(&text);
                }
            }
        }
        self.wire()?.flush().map_err(|_| Over)?;
        self.settle()
    }

    /// Follows the stub where a packet or a report led it.
    fn settle(&mut self) -> Result<(), Over> {
        match self.stub.take().ok_or(Over)? {
            GdbStubStateMachine::Disconnected(s) => {
                if s.get_reason() == DisconnectReason::Kill {
                    self.shared.lifecycle.request(Request::Quit);
                }
                Err(Over)
            }
            GdbStubStateMachine::CtrlCInterrupt(s) => {
                self.shared.link.pause();
                self.stub = Some(s.interrupt_handled(&mut self.target, None::<Reason>).map_err(|_| Over)?);
                Ok(())
            }
            other => {
                self.stub = Some(other);
                Ok(())
            }
        }
    }

    /// The guest stopped: says so, if the debugger waits for it.
    fn stopped(&mut self, vp: VpIndex, stop: &Stop) -> Result<(), Over> {
        self.target.stopped(vp, stop);
        match self.stub.take().ok_or(Over)? {
            GdbStubStateMachine::Running(mut s) => {
                if let Some(text) = target::told(stop, self.target.armed(), &self.target.inspector) {
                    s.borrow_conn().say(&text).map_err(|_| Over)?;
                }
                let reason = target::reason(vp, stop, self.target.armed());
                self.stub = Some(s.report_stop(&mut self.target, reason).map_err(|_| Over)?);
                self.settle()
            }
            other => {
                self.stub = Some(other);
                Ok(())
            }
        }
    }

    /// The end of the machine is told to a debugger that waits for a stop.
    fn report_end(&mut self) -> Result<(), Over> {
        let Some(code) = self.ended else { return Ok(()) };
        match self.stub.take().ok_or(Over)? {
            GdbStubStateMachine::Running(s) => {
                let _told = s.report_stop(&mut self.target, Reason::Exited(code));
                Err(Over)
            }
            other => {
                self.stub = Some(other);
                Ok(())
            }
        }
    }
}

/// Whether this asks for more memory than one answer holds: the stub would send without end.
fn wants_too_much(packet: &[u8]) -> bool {
    let Some(operands) = packet.strip_prefix(b"$m") else { return false };
    let len = operands.split(|&b| b == b',').nth(1).and_then(|len| len.split(|&b| b == b'#').next());
    let len = len.and_then(|len| std::str::from_utf8(len).ok()).map(|len| u64::from_str_radix(len, 16));
    matches!(len, Some(Ok(PACKET_MEMORY..) | Err(_)))
}

fn read_all(mut from: Stream, to: &Sender<Event>) {
    let mut buf = [0; 4096];
    loop {
        match from.read(&mut buf) {
            Ok(n @ 1..) => {
                if to.send(Event::Bytes(buf[..n].to_vec())).is_err() {
                    return;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            _ => {
                let _over = to.send(Event::Hangup);
                return;
            }
        }
    }
}
