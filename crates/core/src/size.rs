//! The one type that does arithmetic on sizes, counts and offsets read from files, and the caps on them.

use std::fmt;

/// Largest numbers accepted from a file, whatever its format.
pub mod cap {
    /// Axes of a tensor.
    pub const AXES: u64 = 4;
    /// Numbers in a tensor.
    pub const ELEMENTS: u64 = 1 << 40;
    /// Tensors in a file.
    pub const TENSORS: u64 = 1_000_000;
    /// Metadata keys in a file.
    pub const KEYS: u64 = 100_000;
    /// Bytes of one string.
    pub const STRING: u64 = 16 << 20;
    /// Elements of one metadata array.
    pub const ARRAY: u64 = 64 << 20;
    /// Bytes of a safetensors header (the format's own limit).
    pub const HEADER: u64 = 100_000_000;
    /// Bytes of a JSON configuration.
    pub const CONFIG: u64 = 4 << 20;
    /// Alignment of tensor data.
    pub const ALIGNMENT: u64 = 1 << 20;
}

/// A number of bytes or elements from an untrusted source; every operation on it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// An operation whose result does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow {
    operation: &'static str,
    left: u64,
    right: u64,
}

impl fmt::Display for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the size {} {} {} does not fit", self.left, self.operation, self.right)
    }
}

impl std::error::Error for Overflow {}

impl Size {
    /// `self + other`.
    pub fn plus(self, other: Size) -> Result<Size, Overflow> {
        self.checked("+", other, u64::checked_add)
    }

    /// `self * other`.
    pub fn times(self, other: Size) -> Result<Size, Overflow> {
        self.checked("*", other, u64::checked_mul)
    }

    /// `self - other`.
    pub fn minus(self, other: Size) -> Result<Size, Overflow> {
        self.checked("-", other, u64::checked_sub)
    }

    /// The next multiple of `alignment` (`self` if it is one); an alignment of 0 does not fit.
    pub fn aligned(self, alignment: Size) -> Result<Size, Overflow> {
        self.checked("aligned to", alignment, u64::checked_next_multiple_of)
    }

    /// `self / other`, which must be a whole number.
    pub fn exactly_over(self, other: Size) -> Result<Size, Overflow> {
        self.checked("in units of", other, |a, b| (a.checked_rem(b)? == 0).then(|| a / b))
    }

    /// The product of all `factors` (1 if there are none).
    pub fn product(factors: impl IntoIterator<Item = u64>) -> Result<Size, Overflow> {
        factors.into_iter().try_fold(Size(1), |p, f| p.times(Size(f)))
    }

    /// As an index of this machine's memory.
    pub fn index(self) -> Result<usize, Overflow> {
        usize::try_from(self.0).map_err(|_| Overflow {
            operation: "as an address below",
            left: self.0,
            right: usize::MAX as u64,
        })
    }

    fn checked(self, operation: &'static str, other: Size, f: fn(u64, u64) -> Option<u64>) -> Result<Size, Overflow> {
        f(self.0, other.0).map(Size).ok_or(Overflow { operation, left: self.0, right: other.0 })
    }
}

impl From<usize> for Size {
    fn from(n: usize) -> Self {
        Size(n as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDGES: [u64; 12] =
        [0, 1, 31, 32, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 32) + 1, (1 << 63) - 1, 1 << 63, u64::MAX - 1, u64::MAX];

    #[test]
    fn operations_agree_with_128_bits() {
        let fits = |wide: Option<u128>| wide.and_then(|w| u64::try_from(w).ok()).map(Size);
        for a in EDGES {
            for b in EDGES {
                let (x, y) = (u128::from(a), u128::from(b));
                assert_eq!(Size(a).plus(Size(b)).ok(), fits(Some(x + y)));
                assert_eq!(Size(a).times(Size(b)).ok(), fits(Some(x * y)));
                assert_eq!(Size(a).minus(Size(b)).ok(), fits(x.checked_sub(y)));
                assert_eq!(Size(a).aligned(Size(b)).ok(), fits(x.checked_next_multiple_of(y)));
                assert_eq!(
                    Size(a).exactly_over(Size(b)).ok(),
                    fits((y > 0 && x % y.max(1) == 0).then(|| x / y.max(1)))
                );
            }
        }
    }

    #[test]
    fn product_and_message() {
        assert_eq!(Size::product([3, 5, 7]), Ok(Size(105)));
        assert_eq!(Size::product([]), Ok(Size(1)));
        let e = Size::product([1 << 32, 1 << 32]).unwrap_err();
        assert_eq!(e.to_string(), "the size 4294967296 * 4294967296 does not fit");
    }
}
