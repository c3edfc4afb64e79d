//! Packed columns against the blocks they were made of: exact moves, sums on all instruction sets, threads and zeros.

use super::*;
use crate::axpy::{self, Columns, Job};
use crate::testing::{Guarded, Random, stored};
use crate::{Pool, convert, isa};

const FORMATS: [Format; 3] = [Format::Q8_0, Format::Q4_0, Format::Q4K];

/// The shapes that blocks of `format` divide.
fn shapes(format: Format) -> Vec<(usize, usize)> {
    SHAPES.map(|(outputs, inputs)| (outputs, inputs.next_multiple_of(format.block_len()))).to_vec()
}
const SHAPES: [(usize, usize); 12] = [
    (1, 32),
    (5, 64),
    (16, 96),
    (63, 32),
    (64, 160),
    (65, 64),
    (127, 32),
    (128, 1024),
    (130, 96),
    (300, 2048),
    (4099, 64),
    (8200, 32),
];

/// An output-major matrix and its packed form, which ends at a guard page.
fn case(format: Format, (outputs, inputs): (usize, usize), random: &mut Random) -> (Vec<u8>, Guarded) {
    let plain = stored(format, outputs * inputs, random);
    let packed = pack(&Matrix::new(format, outputs, inputs, &plain).unwrap()).unwrap();
    assert_eq!(Some(packed.len()), bytes(format, outputs, inputs));
    (plain, Guarded::new(&packed))
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn codes_and_scales_are_moved_and_not_changed() {
    let mut random = Random(3);
    for format in FORMATS {
        for (outputs, inputs) in shapes(format) {
            let (plain, packed) = case(format, (outputs, inputs), &mut random);
            let m = Matrix::new(format, outputs, inputs, &plain).unwrap();
            let w = Groups::new(format, outputs, inputs, packed.bytes()).unwrap();
            let mut row = vec![0.0; inputs];
            for o in 0..outputs {
                convert::decode_run(format, m.row(o), &mut row);
                for (i, want) in row.iter().enumerate() {
                    let (got, minimum) = value(&w, o, i);
                    // Products of Q4_K's scales are rounded to f16.
                    let room =
                        if format == Format::Q4K { (got.abs() + 2.0 * minimum.abs()) * 2f32.powi(-11) } else { 0.0 };
                    assert!((got - want).abs() <= room, "{format:?} {o} {i}: {got} {want}");
                }
            }
        }
    }
}

/// The number that is stored for output `o` of channel `i`, and its group's minimum.
fn value(w: &Groups, o: usize, i: usize) -> (f32, f32) {
    let (byte, upper) = place(o % w.unit());
    let code = w.row(i % GROUP, i / GROUP)[o / w.unit() * LINE + byte];
    let code = if w.format == Format::Q8_0 { code } else { code >> (4 * u8::from(upper)) & 15 };
    let (scales, minima) = w.scales(i / GROUP);
    let half = |from: &[u8]| f16::from_le_bytes([from[2 * o], from[2 * o + 1]]).to_f32();
    let minimum = if minima.is_empty() { 0.0 } else { half(minima) };
    ((i32::from(code) - offset(w.format)) as f32 * half(scales) - minimum, minimum)
}

#[test]
fn sums_are_those_of_the_blocks_on_every_isa() {
    let mut random = Random(4);
    for format in FORMATS {
        for (outputs, inputs) in shapes(format) {
            let (_, packed) = case(format, (outputs, inputs), &mut random);
            let w = Groups::new(format, outputs, inputs, packed.bytes()).unwrap();
            for one_in in [1, 2, 5, 40] {
                let index: Vec<u32> = (0..inputs as u32).filter(|_| random.bits().is_multiple_of(one_in)).collect();
                let value_of = random.floats(index.len());
                let mut first = vec![f32::NAN; outputs];
                let run = |isa, threads, y: &mut [f32]| {
                    let job = Job { w: Columns::Groups(w), index: &index, value: &value_of, y };
                    axpy::run_on(isa, &Pool::new(threads), &mut [job]);
                };
                run(Isa::Scalar, 1, &mut first);
                // Values are rounded to 1/254 of the largest of their group at most.
                for (o, y) in first.iter().enumerate() {
                    let (mut want, mut room) = (0.0, 1e-6);
                    for (&i, &v) in index.iter().zip(&value_of) {
                        let weight = f64::from(value(&w, o, i as usize).0);
                        want += weight * f64::from(v);
                        room += weight.abs() / 254.0 * 1.001;
                    }
                    assert!((f64::from(*y) - want).abs() <= room, "{format:?} {outputs}x{inputs}: {y} {want}");
                }
                for isa in isa::available() {
                    let mut y = vec![f32::NAN; outputs];
                    run(isa, 3, &mut y);
                    assert_eq!(bits(&y), bits(&first), "{format:?} {isa} {outputs}x{inputs} 1/{one_in}");
                }
            }
        }
    }
}

#[test]
fn zeros_order_and_company_change_no_bit() {
    let mut random = Random(5);
    for format in FORMATS {
        let (outputs, inputs) = (200, 2048);
        let (_, packed) = case(format, (outputs, inputs), &mut random);
        let w = Columns::Groups(Groups::new(format, outputs, inputs, packed.bytes()).unwrap());
        let mut value = random.floats(inputs);
        value.iter_mut().step_by(3).for_each(|v| *v = 0.0);
        let all: Vec<u32> = (0..inputs as u32).collect();
        let live: Vec<u32> = all.iter().copied().filter(|&i| value[i as usize] != 0.0).collect();
        let live_value: Vec<f32> = live.iter().map(|&i| value[i as usize]).collect();
        for isa in isa::available() {
            let mut y = [vec![0.0; outputs], vec![0.0; outputs]];
            let [a, b] = &mut y;
            axpy::run_on(isa, &Pool::new(2), &mut [Job { w, index: &all, value: &value, y: a }]);
            axpy::run_on(isa, &Pool::new(1), &mut [Job { w, index: &live, value: &live_value, y: b }]);
            assert_eq!(bits(&y[0]), bits(&y[1]), "{format:?} {isa}");
            let few = ([7_u32, 40], [1.0_f32, -2.0]);
            let x: Vec<(&[u32], &[f32])> = vec![(&few.0, &few.1), (&all, &value), (&[], &[])];
            let mut together = vec![f32::NAN; 3 * outputs];
            axpy::multi::run_on(isa, &Pool::new(2), &mut [axpy::multi::Job { w, x: &x, y: &mut together }]);
            assert_eq!(bits(&together[outputs..2 * outputs]), bits(&y[0]), "{format:?} {isa}");
            assert!(together[2 * outputs..].iter().all(|y| *y == 0.0));
        }
    }
}

#[test]
fn all_instruction_sets_quantise_alike() {
    let inputs = 160_u32;
    let packed = vec![0; bytes(Format::Q4_0, 1, inputs as usize).unwrap()];
    let w = Groups::new(Format::Q4_0, 1, inputs as usize, &packed).unwrap();
    let mut random = Random(11);
    let mut lists: Vec<Vec<u32>> = vec![vec![], vec![159], (0..inputs).collect(), vec![40, 3, 2, 40, 159, 158]];
    for keep in 1..40_u32 {
        lists.push((0..inputs).filter(|i| i * 7919 % 41 < keep).collect());
    }
    for index in lists {
        for special in [None, Some(0.0), Some(f32::NAN), Some(f32::NEG_INFINITY), Some(f32::MIN_POSITIVE / 2.0)] {
            let mut value: Vec<f32> = random.floats(index.len());
            if let (Some(v), Some(special)) = (value.last_mut(), special) {
                *v = special;
            }
            let want = format!("{:?}", Operand::new(Isa::Scalar, &w, &index, &value));
            for isa in isa::available() {
                assert_eq!(format!("{:?}", Operand::new(isa, &w, &index, &value)), want, "{isa} {index:?} {special:?}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_reaches_every_output() {
    let mut random = Random(6);
    let (_, packed) = case(Format::Q4_0, (70, 64), &mut random);
    let w = Columns::Groups(Groups::new(Format::Q4_0, 70, 64, packed.bytes()).unwrap());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for isa in isa::available() {
            let mut y = vec![0.0; 70];
            axpy::run_on(isa, &Pool::new(1), &mut [Job { w, index: &[1, 33, 40], value: &[1.0, bad, 2.0], y: &mut y }]);
            assert!(y.iter().all(|y| !y.is_finite()), "{isa} {bad}");
        }
    }
}

#[test]
fn shapes_that_have_no_such_form() {
    assert_eq!(bytes(Format::Bf16, 32, 32), None);
    assert_eq!(bytes(Format::Q8_0, 32, 48), None);
    assert_eq!(bytes(Format::Q8_0, usize::MAX, 64), None);
    assert!(Groups::new(Format::Q4_0, 1, 32, &[0; 100]).is_none());
    // 32 rows of one line, 128 scales, and what lies between the rows.
    assert_eq!(bytes(Format::Q4_0, 1, 32), Some(32 * 64 + 256 + 32 * 192));
}
