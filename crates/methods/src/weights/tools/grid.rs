//! Symmetric integer grids: `w ~ code * scale`, one scale for each group of columns of a row.

use super::refuse;
use lacuna_core::{
    compress::{Codes, Layer},
    method::{MethodError, Params},
};

/// A grid of `bits` bits and groups of `group` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Bits of a code.
    pub bits: u32,
    /// Columns of a group.
    pub group: usize,
}

impl Grid {
    /// The grid of the parameters `bits` and `group`; `None` at 0 bits.
    ///
    /// # Errors
    /// A group that does not divide the columns.
    pub fn of(params: &Params, layer: &Layer<'_>) -> Result<Option<Self>, MethodError> {
        let (bits, group) = (params.get("bits") as u32, params.get("group") as usize);
        if bits == 0 {
            return Ok(None);
        }
        let group = if group == 0 { layer.inputs } else { group };
        if !layer.inputs.is_multiple_of(group) {
            let most = (1..=group).rev().find(|g| layer.inputs.is_multiple_of(*g)).unwrap_or(1);
            let columns = layer.inputs;
            return refuse(
                layer,
                format!(
                    "groups of {group} do not divide its {columns} columns; the largest that does is {most} (0: whole rows)"
                ),
            );
        }
        Ok(Some(Self { bits, group }))
    }

    fn most(self) -> f32 {
        ((1_i32 << (self.bits - 1)) - 1) as f32
    }

    /// The scale of a group: its largest magnitude at the middle between the two ends of the grid (GPTQ's symmetric
    /// grid), rounded to a number that F16 and BF16 both hold.
    pub fn scale(self, group: impl IntoIterator<Item = f32>) -> f32 {
        let most = group.into_iter().fold(0.0_f32, |m, w| m.max(w.abs()));
        if most == 0.0 {
            return 1.0;
        }
        storable(most / (self.most() + 0.5))
    }

    /// The code of a weight (half to even, as the reference implementations round).
    pub fn code(self, w: f32, scale: f32) -> i8 {
        (w / scale).round_ties_even().clamp(-self.most() - 1.0, self.most()) as i8
    }

    /// Codes with room for a layer.
    pub fn codes(self, layer: &Layer<'_>) -> Codes {
        let n = layer.outputs * layer.inputs;
        Codes { bits: self.bits, group: self.group, codes: vec![0; n], scales: vec![1.0; n / self.group] }
    }
}

/// The nearest number above zero that is exact in F16 and in BF16.
fn storable(x: f32) -> f32 {
    const MOST: f32 = 65_280.0;
    // BF16 has 8 significant bits; F16 has steps of 2^-24 below 2^-14.
    let step = f32::exp2((x.log2().floor() - 7.0).max(-24.0));
    ((x / step).round_ties_even() * step).clamp(f32::exp2(-24.0), MOST)
}

/// What codes stand for.
pub fn decode(codes: &Codes) -> Vec<f32> {
    let scales = codes.scales.iter();
    codes
        .codes
        .chunks_exact(codes.group)
        .zip(scales)
        .flat_map(|(c, s)| c.iter().map(move |c| f32::from(*c) * s))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_exact_in_both_half_formats() {
        let mut x = 3.1e-9_f32;
        while x < 1e5 {
            let s = storable(x);
            let bf16 = f32::from_bits(s.to_bits() & 0xffff_0000);
            assert_eq!(bf16, s, "{x}");
            let f16 = s / f32::exp2(-24.0);
            assert_eq!(f16.fract(), 0.0, "{x}");
            assert!(!(1e-6..6e4).contains(&x) || (s / x - 1.0).abs() < 0.04, "{x} {s}");
            x *= 1.37;
        }
    }

    #[test]
    fn codes_round_half_to_even_and_stay_inside() {
        let g = Grid { bits: 4, group: 4 };
        assert_eq!([0.5, 1.5, 2.5, -0.5, 7.6, 100.0, -100.0].map(|w| g.code(w, 1.0)), [0, 2, 2, 0, 7, 7, -8]);
        assert_eq!((g.scale([7.5, -1.0]), g.scale([0.0; 3])), (1.0, 1.0));
        let two = Grid { bits: 2, group: 1 };
        assert_eq!([-9.0, 0.2, 9.0].map(|w| two.code(w, 1.0)), [-2, 0, 1]);
    }
}
