//! What parsing allocates: at most twice the file and 16 MiB (one test, alone in its process, since it measures that
//! process).
#![cfg(target_os = "linux")]

use lacuna_core::{
    bytes::Bytes,
    format::{gguf::Gguf, safetensors::Tensors},
};
use std::fs;

/// Growth of the process's largest resident size during `f`, in bytes.
fn growth<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let field = |name: &str| -> usize {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    };
    // 5 sets the largest size back to the present one.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = field("VmRSS:");
    let result = f();
    (result, field("VmHWM:").saturating_sub(before))
}

/// A million tensors of one byte each.
fn many_tensors() -> Vec<u8> {
    let n = 1_000_000_u64;
    let mut b = Vec::with_capacity(60 << 20);
    b.extend([b"GGUF".as_slice(), &3_u32.to_le_bytes(), &n.to_le_bytes(), &1_u64.to_le_bytes()].concat());
    b.extend(17_u64.to_le_bytes());
    b.extend(b"general.alignment");
    b.extend([4_u32, 8].map(u32::to_le_bytes).concat());
    for i in 0..n {
        b.extend(7_u64.to_le_bytes());
        b.extend(format!("{i:07}").as_bytes());
        b.extend(1_u32.to_le_bytes());
        b.extend(1_u64.to_le_bytes());
        b.extend(24_u32.to_le_bytes());
        b.extend((8 * i).to_le_bytes());
    }
    b.resize(b.len().next_multiple_of(8) + 8 * n as usize, 0);
    b
}

/// A hundred thousand keys.
fn many_keys() -> Vec<u8> {
    let n = 100_000_u64;
    let mut b = Vec::with_capacity(2 << 20);
    b.extend([b"GGUF".as_slice(), &3_u32.to_le_bytes(), &0_u64.to_le_bytes(), &n.to_le_bytes()].concat());
    for i in 0..n {
        b.extend(5_u64.to_le_bytes());
        b.extend(format!("{i:05}").as_bytes());
        b.extend(0_u32.to_le_bytes());
        b.push(7);
    }
    b
}

/// A safetensors file of `n` tensors of one byte.
fn many_entries(n: usize) -> Vec<u8> {
    let mut b = Vec::with_capacity(100 * n);
    b.extend([0; 8]);
    b.push(b'{');
    for i in 0..n {
        let comma = if i == 0 { "" } else { "," };
        b.extend(
            format!("{comma}\"{i}\":{{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[{i},{}]}}", i + 1).as_bytes(),
        );
    }
    b.push(b'}');
    let header = b.len() as u64 - 8;
    b[..8].copy_from_slice(&header.to_le_bytes());
    b.resize(b.len() + n, 0);
    b
}

#[test]
fn reading_allocates_at_most_twice_the_file_and_16_mib() {
    let check = |size: usize, growth: usize| {
        println!("file {size}, growth {growth}");
        assert!(growth <= 2 * size + (16 << 20), "{growth} bytes for a file of {size}");
    };
    for file in [many_tensors(), many_keys()] {
        let bytes = Bytes::from(file);
        let (gguf, growth) = growth(|| Gguf::parse(bytes.clone()));
        assert!(gguf.unwrap().metadata().iter().len() > 0);
        check(bytes.len(), growth);
    }
    let bytes = Bytes::from(many_entries(500_000));
    let (tensors, growth) = growth(|| Tensors::parse(bytes.clone()));
    assert_eq!(tensors.unwrap().entries().len(), 500_000);
    check(bytes.len(), growth);
}
