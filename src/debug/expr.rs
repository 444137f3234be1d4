//! Expressions in monitor commands: addresses, and conditions evaluated at a breakpoint without a word to the debugger.
//!
//! `rax` or `$rax` is a register of the register file, `[e]` the eight bytes at linear address `e`, `b[e]`, `w[e]`, `d[e]` one,
//! two and four. Operators are C's, unsigned, on 64 bits; what cannot be read makes the expression fail.

use super::memory;
use super::registers;
use paravane_cpu::CpuState;
use paravane_memory::GuestMemory;
use std::fmt;

/// A parsed expression.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expr {
    /// A literal.
    Number(u64),
    /// A register by number.
    Register(usize),
    /// Memory of that many bytes at a linear address.
    Load(usize, Box<Expr>),
    /// `!`, `~` or `-`.
    Unary(char, Box<Expr>),
    /// An operator of [`LEVELS`].
    Binary(&'static str, Box<Expr>, Box<Expr>),
}

/// Why a text is no expression, or an expression has no value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExprError(String);

impl fmt::Display for ExprError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Binary operators, loosest first; a longer one before its prefixes.
const LEVELS: [&[&str]; 10] = [
    &["||"],
    &["&&"],
    &["|"],
    &["^"],
    &["&"],
    &["==", "!="],
    &["<=", ">=", "<", ">"],
    &["<<", ">>"],
    &["+", "-"],
    &["*", "/", "%"],
];

/// Expressions inside expressions at most: what a debugger types cannot exhaust the stack.
const DEPTH: usize = 64;

impl Expr {
    /// Reads all of `text`.
    pub fn parse(text: &str) -> Result<Expr, ExprError> {
        let mut parser = Parser { rest: text, depth: 0 };
        let expr = parser.level(0)?;
        parser.rest = parser.rest.trim_start();
        if parser.rest.is_empty() {
            Ok(expr)
        } else {
            Err(ExprError(format!("'{}' is left over", parser.rest)))
        }
    }

    /// Its value now.
    pub fn value(&self, cpu: &CpuState, mem: &GuestMemory) -> Result<u64, ExprError> {
        Ok(match self {
            Expr::Number(n) => *n,
            Expr::Register(n) => registers::value(cpu, *n),
            Expr::Load(size, at) => {
                let at = at.value(cpu, mem)?;
                let mut buf = [0; 8];
                if memory::read(cpu, mem, at, &mut buf[..*size], false) < *size {
                    return Err(ExprError(format!("no memory at {at:#x}")));
                }
                u64::from_le_bytes(buf)
            }
            Expr::Unary(op, e) => {
                let v = e.value(cpu, mem)?;
                match op {
                    '!' => u64::from(v == 0),
                    '~' => !v,
                    _ => v.wrapping_neg(),
                }
            }
            Expr::Binary("&&", a, b) => u64::from(a.value(cpu, mem)? != 0 && b.value(cpu, mem)? != 0),
            Expr::Binary("||", a, b) => u64::from(a.value(cpu, mem)? != 0 || b.value(cpu, mem)? != 0),
            Expr::Binary(op, a, b) => binary(op, a.value(cpu, mem)?, b.value(cpu, mem)?)?,
        })
    }
}

fn binary(op: &str, a: u64, b: u64) -> Result<u64, ExprError> {
    let by_zero = || ExprError("division by zero".into());
    Ok(match op {
        "|" => a | b,
        "^" => a ^ b,
        "&" => a & b,
        "==" => u64::from(a == b),
        "!=" => u64::from(a != b),
        "<=" => u64::from(a <= b),
        ">=" => u64::from(a >= b),
        "<" => u64::from(a < b),
        ">" => u64::from(a > b),
        "<<" => a.checked_shl(b.min(64) as u32).unwrap_or(0),
        ">>" => a.checked_shr(b.min(64) as u32).unwrap_or(0),
        "+" => a.wrapping_add(b),
        "-" => a.wrapping_sub(b),
        "*" => a.wrapping_mul(b),
        "/" => a.checked_div(b).ok_or_else(by_zero)?,
        _ => a.checked_rem(b).ok_or_else(by_zero)?,
    })
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

impl Parser<'_> {
    fn level(&mut self, level: usize) -> Result<Expr, ExprError> {
        let Some(ops) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.level(level + 1)?;
        while let Some(op) = self.operator(ops) {
            let right = self.level(level + 1)?;
            left = Expr::Binary(op, Box::new(left), Box::new(right));
        }
        Ok(left)
    }

    /// Takes one of `ops`, unless what is there is the start of a longer operator.
    fn operator(&mut self, ops: &[&'static str]) -> Option<&'static str> {
        self.rest = self.rest.trim_start();
        let longest = LEVELS
            .iter()
            .copied()
            .flatten()
            .filter(|op| self.rest.starts_with(**op))
            .max_by_key(|op| op.len())?;
        let op = ops.iter().find(|op| *op == longest)?;
        self.rest = &self.rest[op.len()..];
        Some(op)
    }

    fn take(&mut self, c: char) -> bool {
        self.rest = self.rest.trim_start();
        let Some(rest) = self.rest.strip_prefix(c) else { return false };
        self.rest = rest;
        true
    }

    fn unary(&mut self) -> Result<Expr, ExprError> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err(ExprError("too deep".into()));
        }
        let expr = match ['!', '~', '-'].into_iter().find(|&c| self.take(c)) {
            Some(c) => Expr::Unary(c, Box::new(self.unary()?)),
            None => self.primary()?,
        };
        self.depth -= 1;
        Ok(expr)
    }

    fn closed(&mut self, by: char) -> Result<Expr, ExprError> {
        let inner = self.level(0)?;
        if self.take(by) { Ok(inner) } else { Err(ExprError(format!("'{by}' is missing"))) }
    }

    fn primary(&mut self) -> Result<Expr, ExprError> {
        if self.take('(') {
            return self.closed(')');
        }
        if self.take('[') {
            return Ok(Expr::Load(8, Box::new(self.closed(']')?)));
        }
        let _optional = self.take('$');
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        let size = [("b", 1), ("w", 2), ("d", 4), ("q", 8)].into_iter().find(|s| s.0 == word);
        if let Some((_, size)) = size
            && self.take('[')
        {
            return Ok(Expr::Load(size, Box::new(self.closed(']')?)));
        }
        if let Some(n) = number(word) {
            return Ok(Expr::Number(n));
        }
        match registers::by_name(word) {
            Some(n) => Ok(Expr::Register(n)),
            None if word.is_empty() => Err(ExprError("something is missing".into())),
            None => Err(ExprError(format!("'{word}' is neither a number nor a register"))),
        }
    }
}

/// `0x…` or decimal.
fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_memory::{MemoryConfig, PhysAddr};

    fn value(text: &str) -> Result<u64, ExprError> {
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        mem.write(PhysAddr(0x500), &0x1122_3344_5566_7788u64.to_le_bytes()).expect("RAM");
        let mut cpu = CpuState::reset(0);
        cpu.gpr[0] = 0x500;
        Expr::parse(text)?.value(&cpu, &mem)
    }

    #[test]
    fn precedence_is_that_of_c() {
        for (text, expected) in [
            ("1 + 2 * 3 == 7", 1),
            ("1 << 4 | 1", 17),
            ("6 & 3 == 3", 0),
            ("(6 & 3) == 2", 1),
            ("!0 && ~0 != 0", 1),
            ("10 - 3 - 2", 5),
            ("1 < 2 && 2 >= 3 || 1", 1),
        ] {
            assert_eq!(value(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn registers_and_memory() {
        assert_eq!(value("$rax"), Ok(0x500));
        assert_eq!(value("[rax]"), Ok(0x1122_3344_5566_7788));
        assert_eq!(value("b[rax + 1] == 0x77 && w[rax] == 0x7788 && d[$rax] == 0x55667788"), Ok(1));
        assert!(value("[0xF0000000]").is_err(), "device registers are not read");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, word) in
            [("", "missing"), ("1 +", "missing"), ("(1", "')'"), ("eax ==", "eax"), ("1 2", "left over")]
        {
            let error = value(text).expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(value("1 / 0").is_err());
        assert!(Expr::parse(&"(".repeat(10_000)).is_err());
        assert!(Expr::parse(&"-".repeat(10_000)).is_err());
    }
}
