use super::*;

/// A file with every value type and several tensor types.
fn sample() -> (Writer, Vec<Vec<u8>>) {
    let mut w = Writer::new();
    w.set("general.architecture", Value::String("llama".into()))
        .set("u8", Value::U8(1))
        .set("i8", Value::I8(-1))
        .set("u16", Value::U16(300))
        .set("i16", Value::I16(-300))
        .set("u32", Value::U32(70_000))
        .set("i32", Value::I32(-70_000))
        .set("f32", Value::F32(1.5))
        .set("bool", Value::Bool(true))
        .set("u64", Value::U64(1 << 40))
        .set("i64", Value::I64(-(1 << 40)))
        .set("f64", Value::F64(0.25))
        .set("names", Value::Array(Array::strings(["a", "", "ü"])))
        .set("scores", Value::Array(Array::floats(&[0.5, -2.0])))
        .set("types", Value::Array(Array::ints(&[1, -1, 3])));
    let mut data = Vec::new();
    let kinds = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q5_1"];
    for (i, kind) in TensorType::all().filter(|t| kinds.contains(&t.name())).enumerate() {
        let bytes = w.tensor(&format!("t{i}"), kind, &[256, 1 + i as u64 % 3]).unwrap();
        data.push((0..bytes).map(|b| (b % 50) as u8).collect());
    }
    data.push(vec![7; 12]);
    w.tensor("odd", TensorType::F32, &[3]).unwrap();
    (w, data)
}

fn bytes_of(w: &Writer, data: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    w.write(&mut out, |i, _, out| out.write_all(&data[i])).unwrap();
    out
}

#[test]
fn what_is_written_is_read_back() {
    let (w, data) = sample();
    let bytes = bytes_of(&w, &data);
    assert_eq!(w.file_size().unwrap(), bytes.len() as u64);
    let g = Gguf::parse(bytes.into()).unwrap();
    let m = g.metadata();
    assert_eq!((g.version(), m.iter().len(), m.str("general.architecture").unwrap()), (3, 15, "llama"));
    let ints = ["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"].map(|k| m.int(k, i64::MIN..=i64::MAX).unwrap());
    assert_eq!(ints, [1, -1, 300, -300, 70_000, -70_000, 1 << 40, -(1 << 40)]);
    assert_eq!((m.float("f32").unwrap(), m.float("f64").unwrap(), m.bool("bool").unwrap()), (1.5, 0.25, true));
    assert_eq!(m.strings("names").unwrap(), ["a", "", "ü"]);
    assert_eq!(m.floats("scores").unwrap(), [0.5, -2.0]);
    assert_eq!(m.ints("types", -9..=9).unwrap(), [1, -1, 3]);
    assert_eq!(m.ints("u8", 0..=9).unwrap(), [1]);
    for (t, data) in g.tensors().zip(&data) {
        assert_eq!(g.get(t.name).unwrap().offset, t.offset);
        assert_eq!(*g.bytes(&t).unwrap(), **data, "{}", t.name);
        assert_eq!(t.offset % ALIGNMENT, 0);
    }
    assert_eq!(g.get("t1").unwrap().rows_cols(), (2, 256));
    assert!(g.get("nothing").is_none() && g.require("nothing").unwrap_err().to_string().contains("`nothing`"));
}

#[test]
fn getters_name_key_found_and_expected() {
    let (w, data) = sample();
    let g = Gguf::parse(bytes_of(&w, &data).into()).unwrap();
    let m = g.metadata();
    let text = m.positive("i8").unwrap_err().to_string();
    assert!(text.starts_with("`i8`: found I8(-1), expected a whole number from 1 to 2147483647."), "{text}");
    assert!(m.count("u64").is_err() && m.str("u8").is_err() && m.bool("u8").is_err() && m.array("u8").is_err());
    assert!(m.strings("scores").unwrap_err().to_string().starts_with("`scores`: found a list of F32"));
    assert!(m.floats("names").is_err() && m.ints("types", 0..=9).is_err());
    assert!(m.str("none").unwrap_err().to_string().starts_with("`none`: this metadata key is missing."));
    assert_eq!(m.maybe("none", Metadata::count).unwrap(), None);
    assert!(m.maybe("names", Metadata::count).is_err());
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let (mut w, data) = sample();
    assert!(w.tensor("", TensorType::F32, &[1]).is_err());
    assert!(w.tensor("x", TensorType::Q4_K, &[255]).is_err());
    assert!(w.tensor("x", TensorType::F32, &[1; 5]).is_err());
    assert!(w.write(&mut Vec::new(), |i, _, o| o.write_all(&data[i][1..])).is_err(), "too few bytes");
    assert!(w.write(&mut Vec::new(), |i, _, o| o.write_all(&[&data[i][..], &[0]].concat())).is_err(), "too many");
    w.tensor("odd", TensorType::F32, &[3]).unwrap();
    assert!(w.file_size().is_err(), "a name twice");
}

#[test]
fn every_cut_is_an_error_with_a_byte() {
    let (w, data) = sample();
    let bytes = Bytes::from(bytes_of(&w, &data));
    let end = Gguf::parse(bytes.clone()).unwrap().get("odd").map(|t| t.offset + t.bytes).unwrap() as usize;
    for length in 0..end {
        let e = Gguf::parse(bytes.slice(0..length).unwrap()).unwrap_err();
        assert!(e.place().is_some_and(|p| p.byte.is_some()), "cut at {length}: {e}");
    }
    assert!(Gguf::parse(bytes.slice(0..end).unwrap()).is_ok(), "the last tensor needs no padding");
}

#[test]
fn hashes_follow_header_and_data() {
    let (mut w, mut data) = sample();
    let hash = |w: &Writer, d: &[Vec<u8>]| Gguf::parse(bytes_of(w, d).into()).unwrap().hash();
    let base = hash(&w, &data);
    data[0][5] ^= 1;
    let other_data = hash(&w, &data);
    data[0][5] ^= 1;
    w.set("u8", Value::U8(2));
    let other_key = hash(&w, &data);
    assert!(base.len() == 64 && base != other_data && base != other_key);
}

#[test]
fn a_large_vocabulary_costs_little() {
    let mut w = Writer::new();
    w.set("tokenizer.ggml.tokens", Value::Array(Array::strings((0..128_256).map(|i| format!("token{i}")))));
    let bytes = Bytes::from(bytes_of(&w, &[]));
    let g = Gguf::parse(bytes).unwrap();
    assert_eq!(g.metadata().strings("tokenizer.ggml.tokens").unwrap()[128_255], "token128255");
}
