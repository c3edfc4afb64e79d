//! The one place that picks an instruction set.
//!
//! Kernels take an [`Isa`] as an argument in their inner interface, so that tests can compare all of them within one
//! process; the public entry points pass [`get`]. The environment variable `LACUNA_ISA` forces a choice.

use std::fmt;
use std::sync::OnceLock;

/// An instruction set that kernels are written for, least capable first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust: the readable reference.
    Scalar,
    /// AVX2 with FMA, F16C and POPCNT.
    Avx2,
    /// AVX-512 F, BW, VL, DQ, VBMI, VBMI2, VNNI and BF16, with GFNI (Zen 4 and later, Sapphire Rapids and later).
    Avx512,
    /// AVX-512 as above plus AMX tiles for int8 and bf16; kernels without a tile form use their AVX-512 form.
    Amx,
    /// NEON of AArch64.
    Neon,
}

/// The environment variable that forces an instruction set.
pub const ENV: &str = "LACUNA_ISA";

impl Isa {
    /// Every instruction set, in the order of the declaration.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx, Isa::Neon];

    /// The word that names it in `LACUNA_ISA` and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
        }
    }

    /// True if AVX-512 kernels may run, that is for [`Isa::Avx512`] and [`Isa::Amx`].
    pub const fn has_avx512(self) -> bool {
        matches!(self, Isa::Avx512 | Isa::Amx)
    }

    /// True if this CPU (and its operating system) can run it.
    pub fn is_available(self) -> bool {
        found().contains(&self)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The instruction sets this machine can run, least capable first; never empty.
pub fn available() -> Vec<Isa> {
    found().to_vec()
}

fn found() -> &'static [Isa] {
    static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
    FOUND.get_or_init(|| Isa::ALL.into_iter().filter(|&isa| supported(isa)).collect())
}

/// The instruction set to use: the one forced by `LACUNA_ISA`, or the best available.
///
/// # Errors
/// The variable holds an unknown word or a set this CPU lacks; the message lists the possible ones.
pub fn detect() -> Result<Isa, String> {
    let word = std::env::var_os(ENV);
    let word = word.as_ref().map(|w| w.to_string_lossy());
    choose(word.as_deref(), &available())
}

/// The instruction set of this process, detected once. An invalid `LACUNA_ISA` counts as not set here: programs call
/// [`detect`] first and report the error.
pub fn get() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| detect().unwrap_or_else(|_| best(&available())))
}

fn best(available: &[Isa]) -> Isa {
    available.last().copied().unwrap_or(Isa::Scalar)
}

fn choose(word: Option<&str>, available: &[Isa]) -> Result<Isa, String> {
    let Some(word) = word.map(str::trim).filter(|w| !w.is_empty()) else {
        return Ok(best(available));
    };
    let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
    let possible = names.join(", ");
    match Isa::ALL.into_iter().find(|isa| isa.name().eq_ignore_ascii_case(word)) {
        Some(isa) if available.contains(&isa) => Ok(isa),
        Some(isa) => Err(format!("{ENV}={isa}: this CPU or system lacks it; possible here: {possible}")),
        None => Err(format!("{ENV}={word:?}: unknown instruction set; possible here: {possible}")),
    }
}

#[cfg(target_arch = "x86_64")]
fn supported(isa: Isa) -> bool {
    match isa {
        Isa::Scalar => true,
        Isa::Avx2 => has_avx2(),
        Isa::Avx512 => has_avx2() && has_avx512(),
        Isa::Amx => has_avx2() && has_avx512() && has_amx(),
        Isa::Neon => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn supported(isa: Isa) -> bool {
    matches!(isa, Isa::Scalar | Isa::Neon)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn supported(isa: Isa) -> bool {
    isa == Isa::Scalar
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("gfni")
}

/// AMX in CPUID (leaf 7: EDX bit 22 bf16, 24 tile, 25 int8) and the kernel's permission to use the tile registers.
#[cfg(target_arch = "x86_64")]
fn has_amx() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const BITS: u32 = (1 << 22) | (1 << 24) | (1 << 25);
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BITS == BITS && request_tiles()
}

/// Asks Linux for the tile state component (18) of XSAVE; the permission holds for every thread of the process.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request_tiles() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: arch_prctl with this code reads no memory of ours and only changes a permission of the process; the
    // system call overwrites rcx and r11, which are declared.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn request_tiles() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_there_and_the_best_is_last() {
        let found = available();
        assert_eq!(found[0], Isa::Scalar);
        assert!(found.is_sorted());
        assert!(found.contains(&get()));
    }

    #[test]
    fn choice_follows_the_word() {
        let have = [Isa::Scalar, Isa::Avx2];
        assert_eq!(choose(None, &have), Ok(Isa::Avx2));
        assert_eq!(choose(Some(""), &have), Ok(Isa::Avx2));
        assert_eq!(choose(Some("Scalar"), &have), Ok(Isa::Scalar));
    }

    #[test]
    fn errors_list_what_is_possible() {
        let have = [Isa::Scalar, Isa::Avx2];
        for word in ["amx", "sse9"] {
            let error = choose(Some(word), &have).unwrap_err();
            assert!(error.contains(word) && error.contains("scalar, avx2"), "{error}");
        }
    }
}
