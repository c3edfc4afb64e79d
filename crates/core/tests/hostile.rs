//! Hostile input: random, cut, flipped and hand-made files never panic, and give errors that say
//! where. The bodies are those of the fuzz targets (`fuzz/`).

use lacuna_core::{
    bytes::Bytes,
    format::{fuzz, gguf::Gguf},
};
use std::path::{Path, PathBuf};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models/stories260K").join(name);
    if !path.exists() {
        println!("skipped: not present: {}", path.display());
    }
    path.exists().then_some(path)
}

#[test]
fn random_bytes_with_a_plausible_start() {
    let starts: [&[u8]; 4] =
        [b"", b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0", b"\x40\0\0\0\0\0\0\0{\"a\":{", b"{\"k\":"];
    let mut random = Random(1);
    for i in 0..20_000 {
        let mut bytes = starts[i % starts.len()].to_vec();
        let length = random.below(200);
        bytes.extend((0..length).map(|_| random.next() as u8));
        fuzz::all(&bytes);
    }
}

#[test]
fn ten_thousand_flipped_bits_of_real_files() {
    for name in ["gguf/stories260K-q4_0.gguf", "hf-f32/model.safetensors", "hf-f32/config.json"] {
        let Some(path) = shared(name) else { continue };
        let mut bytes = std::fs::read(path).unwrap();
        let mut random = Random(2);
        // Flips among the weights change no structure: look where the header is.
        let header = bytes.len().min(20_000);
        for _ in 0..10_000 {
            let (at, bit) = (random.below(header), random.below(8));
            bytes[at] ^= 1 << bit;
            fuzz::headers(&bytes);
            bytes[at] ^= 1 << bit;
        }
    }
}

#[test]
fn cuts_of_real_files() {
    for name in ["f32", "f16", "q8_0", "q4_0"] {
        let Some(path) = shared(&format!("gguf/stories260K-{name}.gguf")) else { continue };
        let bytes = Bytes::from(std::fs::read(path).unwrap());
        Gguf::parse(bytes.clone()).unwrap();
        for length in (0..bytes.len() - 32).step_by(97) {
            let e = Gguf::parse(bytes.slice(0..length).unwrap()).unwrap_err();
            assert!(e.place().is_some_and(|p| p.byte.is_some()), "{name} cut at {length}: {e}");
        }
    }
}

#[test]
fn counts_that_no_file_can_hold() {
    for count in [1_u64 << 20, 1 << 30, 1 << 40, u64::MAX] {
        let head = |tensors: u64, keys: u64| {
            [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
        };
        let key = |kind: u32, rest: &[u8]| [&1_u64.to_le_bytes()[..], b"k", &kind.to_le_bytes(), rest].concat();
        let string = key(8, &count.to_le_bytes());
        let list = key(9, &[&8_u32.to_le_bytes()[..], &count.to_le_bytes()].concat());
        let numbers = key(9, &[&10_u32.to_le_bytes()[..], &count.to_le_bytes()].concat());
        for bomb in [
            head(count, 0),
            head(0, count),
            [head(0, 1), string].concat(),
            [head(0, 1), list].concat(),
            [head(0, 1), numbers].concat(),
        ] {
            let bytes = Bytes::from(bomb);
            // Reserving for the count would abort the program here.
            assert!(Gguf::parse(bytes).is_err());
        }
    }
}
