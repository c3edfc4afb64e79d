//! Decoders against the `gguf` Python package, bit for bit (fixture: `tools/gguf_blocks.py`).

use lacuna_core::format::gguf::{TensorType, decode_run};

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn every_block_decodes_as_the_reference_does() {
    let fixture = include_bytes!("fixtures/gguf-blocks.bin");
    let (mut at, mut seen) = (0, Vec::new());
    while at < fixture.len() {
        let kind = TensorType::parse(u32_at(fixture, at)).unwrap();
        let blocks = u32_at(fixture, at + 4) as usize;
        let (start, n) = (at + 8, blocks * kind.block_len());
        let values = start + blocks * kind.block_bytes();
        let mut out = vec![f32::NAN; n];
        decode_run(kind, &fixture[start..values], &mut out).unwrap();
        for (i, x) in out.iter().enumerate() {
            let wanted = f32::from_bits(u32_at(fixture, values + 4 * i));
            // -0 and 0 are the same number.
            assert!(*x == wanted, "{} number {i}: {x} instead of {wanted}", kind.name());
        }
        at = values + 4 * n;
        seen.push(kind.name());
    }
    let all = ["BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];
    assert_eq!(seen, all);
}
