use super::*;
use half::f16;

/// Uniform numbers in -1..1 (xorshift).
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn encode(format: Format, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0xAA; format.run_bytes(values.len()).unwrap()];
    encode_run(format, values, &mut out);
    out
}

fn decode(format: Format, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / format.block_bytes() * format.block_len()];
    decode_run(format, bytes, &mut out);
    out
}

fn one() -> [u8; 2] {
    f16::ONE.to_le_bytes()
}

#[test]
fn q4_0_code_8_is_zero_and_halves_are_16_apart() {
    let mut block = [one().as_slice(), &[0x88; 16]].concat();
    assert_eq!(decode(Format::Q4_0, &block), [0.0; 32]);
    block[2] = 0xF1;
    let x = decode(Format::Q4_0, &block);
    assert_eq!((x[0], x[16]), (-7.0, 7.0));
}

#[test]
fn q8_0_holds_plain_integers() {
    let codes: Vec<i8> = (-16..16).map(|i| 7 * i).collect();
    let block: Vec<u8> = one().into_iter().chain(codes.iter().map(|c| *c as u8)).collect();
    assert!(decode(Format::Q8_0, &block).iter().zip(&codes).all(|(x, c)| *x == f32::from(*c)));
}

#[test]
fn q4_k_scales_reach_their_own_sub_block_only() {
    for j in 0..8 {
        for (sc, m) in [(63_u8, 0_u8), (0, 63), (37, 21)] {
            let mut block = [one(), one()].concat();
            block.extend([0; 12]);
            block.extend([0x77; 128]);
            let scales = &mut block[4..16];
            // Packed by hand, following the sheet from the other side.
            if j < 4 {
                (scales[j], scales[j + 4]) = (sc, m);
            } else {
                scales[j + 4] = sc & 15 | m << 4;
                scales[j - 4] = sc >> 4 << 6;
                scales[j] = m >> 4 << 6;
            }
            for (i, x) in decode(Format::Q4K, &block).into_iter().enumerate() {
                let wanted = if i / 32 == j { 7.0 * f32::from(sc) - f32::from(m) } else { 0.0 };
                assert_eq!(x, wanted, "sub-block {j}, element {i}");
            }
        }
    }
}

#[test]
fn q6_k_code_32_is_zero_and_each_code_has_its_place() {
    let zero = [vec![0; 128], vec![0xAA; 64], vec![1; 16], one().to_vec()].concat();
    assert_eq!(decode(Format::Q6K, &zero), [0.0; 256]);
    for i in 0..256 {
        let mut block = zero.clone();
        let (half, l, quarter) = (i / 128, i % 32, i % 128 / 32);
        block[64 * half + l + 32 * (quarter & 1)] |= 5 << (if quarter < 2 { 0 } else { 4 });
        block[192 + i / 16] = 3;
        let x = decode(Format::Q6K, &block);
        assert_eq!((x[i], x.iter().filter(|v| **v != 0.0).count()), (15.0, 1), "element {i}");
    }
}

#[test]
fn floats_round_trip_with_specials() {
    let specials = [0.0, -0.0, 1.0, -2.5, f32::INFINITY, f32::NEG_INFINITY, 6.0e-8, 65504.0, 1.0e-45];
    assert_eq!(decode(Format::F32, &encode(Format::F32, &specials)), specials);
    let half = decode(Format::F16, &encode(Format::F16, &specials));
    assert_eq!(half[..6], specials[..6]);
    assert_eq!(half[6], 2.0_f32.powi(-24), "the smallest f16 subnormal");
    assert_eq!(half[7], 65504.0);
    for format in [Format::F32, Format::F16, Format::Bf16] {
        assert!(decode(format, &encode(format, &[f32::NAN, f32::from_bits(0x7F80_0001)])).iter().all(|v| v.is_nan()));
    }
}

#[test]
fn every_f16_pattern_decodes_exactly() {
    for bits in 0..=u16::MAX {
        let x = decode(Format::F16, &bits.to_le_bytes())[0];
        let (sign, exponent, mantissa) = (bits >> 15, i32::from(bits >> 10 & 31), f32::from(bits & 1023));
        let size = match exponent {
            0 => mantissa * 2.0_f32.powi(-24),
            31 if mantissa == 0.0 => f32::INFINITY,
            31 => f32::NAN,
            e => (1.0 + mantissa / 1024.0) * 2.0_f32.powi(e - 15),
        };
        let wanted = if sign == 1 { -size } else { size };
        assert!(x == wanted || x.is_nan() && wanted.is_nan(), "{bits:#06x}: {x} {wanted}");
    }
}

#[test]
fn bf16_rounds_ties_to_even() {
    let cases = [(0x3F80_8000, 0x3F80), (0x3F81_8000, 0x3F82), (0x3F80_8001, 0x3F81), (0x7F7F_FFFF, 0x7F80)];
    for (bits, wanted) in cases {
        assert_eq!(encode(Format::Bf16, &[f32::from_bits(bits)]), u16::to_le_bytes(wanted));
    }
}

#[test]
fn long_float_runs_of_odd_length() {
    for n in [1, 255, 256, 257, 1001] {
        let x = numbers(n, n as u64);
        for (format, error) in [(Format::F32, 0.0), (Format::F16, 1.0 / 2048.0), (Format::Bf16, 1.0 / 256.0)] {
            let y = decode(format, &encode(format, &x));
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() <= error * a.abs() + 3e-8), "{} {n}", format.name());
        }
    }
}

#[test]
fn q8_0_and_q4_0_stay_within_their_bounds() {
    let x = numbers(32 * 500, 9);
    for (format, largest_code) in [(Format::Q8_0, 127.0), (Format::Q4_0, 8.0)] {
        let y = decode(format, &encode(format, &x));
        for (a, b) in x.chunks(32).zip(y.chunks(32)) {
            let d = a.iter().fold(0.0_f32, |m, v| m.max(v.abs())) / largest_code;
            // Half a step, one step for the clipped end of Q4_0, and the rounding of the scale to f16.
            let bound = if format == Format::Q8_0 { 0.5 } else { 1.0 } * d + largest_code * d / 2048.0;
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= bound), "{}", format.name());
        }
    }
}

/// Root mean square error over root mean square.
fn relative_error(format: Format, x: &[f32]) -> f64 {
    let y = decode(format, &encode(format, x));
    let sum = |f: &dyn Fn(usize) -> f32| (0..x.len()).map(|i| f64::from(f(i)).powi(2)).sum::<f64>();
    (sum(&|i| x[i] - y[i]) / sum(&|i| x[i])).sqrt()
}

#[test]
fn k_formats_lose_no_more_than_their_bits() {
    let uniform = numbers(256 * 200, 5);
    // Sums of four uniform numbers are near enough to the bell shape of weights.
    let bell: Vec<f32> = uniform.chunks(4).map(|c| c.iter().sum()).collect();
    for x in [&uniform, &bell] {
        assert!(relative_error(Format::Q4K, x) < 0.08, "{}", relative_error(Format::Q4K, x));
        assert!(relative_error(Format::Q6K, x) < 0.02, "{}", relative_error(Format::Q6K, x));
    }
    assert!(relative_error(Format::Q4K, &bell) < relative_error(Format::Q4_0, &bell));
}

#[test]
fn constant_and_zero_blocks() {
    for format in Format::ALL {
        let n = format.block_len().max(4);
        assert!(decode(format, &encode(format, &vec![0.0; n])).iter().all(|v| *v == 0.0), "{}", format.name());
        for c in [0.25, -0.25] {
            let y = decode(format, &encode(format, &vec![c; n]));
            assert!(y.iter().all(|v| (v - c).abs() < 0.004), "{} {c} {:?}", format.name(), &y[..4]);
        }
    }
}

#[test]
fn random_bytes_decode_to_finite_numbers_when_the_scales_are_finite() {
    let noise: Vec<u8> = numbers(144 * 210, 3).iter().map(|v| (v * 127.0) as i8 as u8).collect();
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K] {
        let mut bytes = noise[..noise.len() / format.block_bytes() * format.block_bytes()].to_vec();
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            let scales: &[usize] = match format {
                Format::Q4K => &[0, 2],
                Format::Q6K => &[208],
                _ => &[0],
            };
            scales.iter().for_each(|s| block[*s..*s + 2].copy_from_slice(&one()));
        }
        assert!(decode(format, &bytes).iter().all(|v| v.is_finite()), "{}", format.name());
    }
}

#[test]
fn encoding_what_is_not_finite_does_not_panic() {
    for format in Format::ALL {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-40] {
            let mut x = numbers(256, 4);
            x[17] = odd;
            x[200] = -odd;
            assert_eq!(encode(format, &x).len(), format.run_bytes(256).unwrap());
        }
    }
}

#[test]
#[should_panic(expected = "another length")]
fn a_wrong_length_is_refused() {
    decode_run(Format::Q4_0, &[0; 17], &mut [0.0; 32]);
}

#[test]
fn what_is_not_finite_is_found_where_it_is() {
    for format in Format::ALL {
        let blocks = 2500;
        let clean = encode(format, &vec![0.5; blocks * format.block_len()]);
        assert_eq!(first_non_finite(format, &clean), None, "{}", format.name());
        let scales: &[usize] = match format {
            Format::Q4K => &[0, 2],
            Format::Q6K => &[208],
            _ => &[0],
        };
        for (block, at) in [0, 1, 1023, 1024, 2499].into_iter().flat_map(|b| scales.iter().map(move |s| (b, *s))) {
            for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut bytes = clean.clone();
                let stored = match format {
                    Format::F32 | Format::F16 | Format::Bf16 => encode(format, &[x]),
                    _ => f16::from_f32(x).to_le_bytes().to_vec(),
                };
                let at = block * format.block_bytes() + at;
                bytes[at..at + stored.len()].copy_from_slice(&stored);
                assert_eq!(first_non_finite(format, &bytes), Some(block * format.block_len()), "{}", format.name());
            }
        }
        assert_eq!(first_non_finite(format, &[]), None);
    }
}
