//! What one run of a program gave, and the mark that tells it.

/// What one program did in one run, or what a machine needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The program
    pub name: String,
    /// Units of work
    pub units: u64,
    /// A checksum, or `skipped`
    pub result: String,
    /// Host CPU time; of a memory row, bytes; of a program with several threads, time
    pub cost: u64,
    /// Native samples of the same program, taken right after this one while its machine stood still
    pub beside: Vec<Sample>,
}

impl Sample {
    /// Whether the processor has what the program measures.
    pub fn measured(&self) -> bool {
        self.result != "skipped"
    }
}

/// `@@end NAME UNITS RESULT CPU_NANOSECONDS`, perhaps behind a kernel message.
pub fn parse_end(line: &str) -> Option<Sample> {
    let (_, rest) = line.split_once("@@end ")?;
    let mut words = rest.split_whitespace();
    Some(Sample {
        name: words.next()?.to_owned(),
        units: words.next()?.parse().ok()?,
        result: words.next()?.to_owned(),
        cost: words.next()?.parse().ok()?,
        beside: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_marks() {
        let sample = parse_end("[ 1.0] x@@end sort 20 d3944189044d9c7f 18115000\r\n").unwrap();
        assert_eq!((sample.name.as_str(), sample.units, sample.cost), ("sort", 20, 18_115_000));
        assert_eq!(sample.result, "d3944189044d9c7f");
        assert!(sample.measured() && !parse_end("@@end avx2 1 skipped 0").unwrap().measured());
        assert!(parse_end("@@end sort").is_none() && parse_end("@@begin sort").is_none());
    }
}
