//! The debugger's connection: a TCP or UNIX stream, and packets in what comes over it.

use gdbstub::conn::Connection;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connected socket.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(super) fn try_clone(&self) -> io::Result<Stream> {
        match self {
            Stream::Tcp(s) => s.try_clone().map(Stream::Tcp),
            Stream::Unix(s) => s.try_clone().map(Stream::Unix),
        }
    }

    pub(super) fn close(&self) {
        let _gone = match self {
            Stream::Tcp(s) => s.shutdown(Shutdown::Both),
            Stream::Unix(s) => s.shutdown(Shutdown::Both),
        };
    }

    pub(super) fn limit(&self, patience: Duration) -> io::Result<()> {
        match self {
            Stream::Tcp(s) => s.set_read_timeout(Some(patience)).and(s.set_write_timeout(Some(patience))),
            Stream::Unix(s) => s.set_read_timeout(Some(patience)).and(s.set_write_timeout(Some(patience))),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(buf),
            Stream::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => Write::write(s, buf),
            Stream::Unix(s) => Write::write(s, buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writing half: a packet goes out in one piece.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Stream,
    pending: Vec<u8>,
}

impl Wire {
    pub(super) fn new(stream: Stream) -> Wire {
        Wire { stream, pending: Vec::new() }
    }

    /// Sends a packet of our own making.
    pub(super) fn packet(&mut self, body: &[u8]) -> io::Result<()> {
        self.pending.extend_from_slice(&frame(body));
        Connection::flush(self)
    }

    /// Text for the debugger's console, while it waits for the guest to stop.
    pub(super) fn say(&mut self, text: &str) -> io::Result<()> {
        let hex: String = text.bytes().map(|b| format!("{b:02x}")).collect();
        self.packet(format!("O{hex}").as_bytes())
    }

    /// A byte outside packets.
    pub(super) fn byte(&mut self, byte: u8) -> io::Result<()> {
        self.pending.push(byte);
        Connection::flush(self)
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.pending.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let sent = self.stream.write_all(&self.pending);
        self.pending.clear();
        sent
    }
}

/// `$body#checksum`.
pub(super) fn frame(body: &[u8]) -> Vec<u8> {
    let sum = body.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    [b"$", body, format!("#{sum:02x}").as_bytes()].concat()
}

/// Bytes of a packet at most, frame included; told to the debugger.
pub(super) const PACKET_MAX: usize = 64 << 10;

/// What a stream of bytes holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Frame {
    /// A whole packet, its frame included.
    Packet(Vec<u8>),
    /// Ctrl-C.
    Interrupt,
    /// The checksum is wrong.
    Damaged,
    /// More than [`PACKET_MAX`].
    TooLong,
}

/// Finds packets in a stream; acknowledgements and noise between packets are dropped.
#[derive(Default, Debug)]
pub(super) struct Framer {
    packet: Vec<u8>,
    /// Bytes of checksum still to come.
    tail: usize,
    too_long: bool,
}

impl Framer {
    pub(super) fn next(&mut self, byte: u8) -> Option<Frame> {
        if self.packet.is_empty() {
            match byte {
                b'$' => self.packet.push(byte),
                3 => return Some(Frame::Interrupt),
                _ => {}
            }
            return None;
        }
        if self.packet.len() < PACKET_MAX {
            self.packet.push(byte);
        } else {
            self.too_long = true;
        }
        match (self.tail, byte) {
            (0, b'#') => self.tail = 2,
            // The frame before was cut short.
            (0, b'$') => {
                self.packet.clear();
                self.packet.push(b'$');
                self.too_long = false;
            }
            (0, _) => {}
            (1, _) => {
                self.tail = 0;
                let packet = std::mem::take(&mut self.packet);
                if std::mem::take(&mut self.too_long) {
                    return Some(Frame::TooLong);
                }
                let body = &packet[1..packet.len() - 3];
                let good = frame(body).eq_ignore_ascii_case(&packet);
                return Some(if good { Frame::Packet(packet) } else { Frame::Damaged });
            }
            (_, _) => self.tail -= 1,
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(bytes: &[u8]) -> Vec<Frame> {
        let mut framer = Framer::default();
        bytes.iter().filter_map(|&b| framer.next(b)).collect()
    }

    #[test]
    fn packets_are_told_from_noise() {
        let packet = |text: &[u8]| Frame::Packet(text.to_vec());
        assert_eq!(
            frames(b"+$g#67-\x03x$m0,4#fd"),
            [packet(b"$g#67"), Frame::Interrupt, packet(b"$m0,4#fd")]
        );
        assert_eq!(frames(b"$g#00$g#67"), [Frame::Damaged, packet(b"$g#67")]);
        assert_eq!(frames(b"$g$g#67"), [packet(b"$g#67")]);
        assert_eq!(frames(b"$#00"), [packet(b"$#00")]);
        assert_eq!(frames(b"$g#zz"), [Frame::Damaged]);
    }

    #[test]
    fn a_packet_without_end_takes_no_memory_without_end() {
        let mut bytes = vec![b'$'];
        bytes.resize(4 * PACKET_MAX, b'a');
        bytes.extend(b"#00$g#67");
        assert_eq!(frames(&bytes), [Frame::TooLong, Frame::Packet(b"$g#67".to_vec())]);
    }
}
