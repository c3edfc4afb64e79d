//! What the tests of several kernels share: seeded numbers, random stored rows, memory that ends at a guard page.

use crate::{Format, convert};
use half::f16;

/// A small seeded generator (splitmix64, Steele et al. 2014).
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in [-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `n` numbers in [-1, 1).
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Stored numbers with every code possible: float formats hold values in [-1, 1), block formats random bytes with
/// finite scales.
pub fn stored(format: Format, n: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; format.run_bytes(n).expect("whole blocks")];
    if format.block_len() == 1 {
        convert::encode_run(format, &random.floats(n), &mut bytes);
        return bytes;
    }
    bytes.fill_with(|| random.bits() as u8);
    let scales: &[usize] = match format {
        Format::Q4K => &[0, 2],
        Format::Q6K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in scales {
            block[at..at + 2].copy_from_slice(&f16::from_f32(random.float() * 0.1).to_le_bytes());
        }
    }
    bytes
}

/// A copy of bytes that ends where an inaccessible page begins (or plain memory where there is no mmap).
pub struct Guarded {
    #[cfg(target_os = "linux")]
    map: (*mut u8, usize),
    #[cfg(not(target_os = "linux"))]
    bytes: Vec<u8>,
    #[cfg(target_os = "linux")]
    bytes: (*const u8, usize),
}

#[cfg(target_os = "linux")]
impl Guarded {
    /// Copies `bytes` so that the byte after the last one cannot be read.
    pub fn new(bytes: &[u8]) -> Self {
        const PAGE: usize = 4096;
        let room = bytes.len().next_multiple_of(PAGE).max(PAGE);
        let size = room + PAGE;
        // SAFETY: a fresh anonymous map of `size` bytes; the first `room` bytes are writable and the copy ends there.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            let map = map.cast::<u8>();
            assert_eq!(libc::mprotect(map.add(room).cast(), PAGE, libc::PROT_NONE), 0);
            let start = map.add(room - bytes.len());
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len());
            Self { map: (map, size), bytes: (start, bytes.len()) }
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: written by `new` and mapped until drop.
        unsafe { std::slice::from_raw_parts(self.bytes.0, self.bytes.1) }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the map of `new`, unmapped once.
        unsafe { libc::munmap(self.map.0.cast(), self.map.1) };
    }
}

#[cfg(not(target_os = "linux"))]
impl Guarded {
    /// Copies `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec() }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
