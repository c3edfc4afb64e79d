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

/// Builds files field by field, so that any of them can be wrong.
#[derive(Clone)]
struct Raw {
    magic: [u8; 4],
    version: u32,
    tensors: u64,
    keys: u64,
    /// Key, type and value as stored.
    pairs: Vec<Vec<u8>>,
    infos: Vec<Info>,
    data: usize,
}

#[derive(Clone)]
struct Info {
    name: Vec<u8>,
    axes: u32,
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

fn text(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s].concat()
}

fn pair(key: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

impl Raw {
    /// Two tensors of 32 bytes and two keys.
    fn good() -> Self {
        let info = |name: &[u8], offset| Info { name: name.to_vec(), axes: 1, dims: vec![8], kind: 0, offset };
        let pairs = vec![pair(b"k", 4, &7_u32.to_le_bytes()), pair(b"s", 8, &text(b"value"))];
        let infos = vec![info(b"a", 0), info(b"b", 32)];
        Raw { magic: MAGIC, version: 3, tensors: 2, keys: 2, pairs, infos, data: 64 }
    }

    fn bytes(&self) -> Bytes {
        let mut b = self.magic.to_vec();
        b.extend(self.version.to_le_bytes());
        b.extend(self.tensors.to_le_bytes());
        b.extend(self.keys.to_le_bytes());
        self.pairs.iter().for_each(|p| b.extend(p));
        for i in &self.infos {
            b.extend(text(&i.name));
            b.extend(i.axes.to_le_bytes());
            i.dims.iter().for_each(|d| b.extend(d.to_le_bytes()));
            b.extend(i.kind.to_le_bytes());
            b.extend(i.offset.to_le_bytes());
        }
        b.resize(b.len().next_multiple_of(32) + self.data, 0);
        b.into()
    }

    /// The message for this file with one change.
    fn refused(change: impl FnOnce(&mut Raw)) -> String {
        let mut raw = Raw::good();
        change(&mut raw);
        let e = Gguf::parse(raw.bytes()).expect_err("the file is wrong");
        assert!(e.place().is_some_and(|p| p.byte.is_some() || p.item.is_some()), "{e}");
        e.to_string()
    }
}

#[test]
fn handcrafted_bad_files() {
    type Change = fn(&mut Raw);
    Gguf::parse(Raw::good().bytes()).unwrap();
    let list = |kind: u32, count: u64, rest: &[u8]| [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat();
    let value =
        |key: &'static [u8], kind: u32, value: Vec<u8>| Raw::refused(move |r| r.pairs[0] = pair(key, kind, &value));
    let alignment = |n: u32| value(b"general.alignment", 4, n.to_le_bytes().to_vec());
    let changes: [(Change, &str); 24] = [
        (|r| r.magic = *b"GGUX", "expected `GGUF`"),
        (|r| r.version = 0, "not supported"),
        (|r| r.version = 1, "GGUF version 1 is not supported"),
        (|r| r.version = 4, "GGUF version 4"),
        (|r| r.version = 3_u32.swap_bytes(), "big-endian"),
        (|r| r.tensors = 3, ""),
        (|r| r.tensors = 1, ""),
        (|r| r.keys = 3, ""),
        (|r| r.keys = 1, ""),
        (|r| r.pairs[1] = r.pairs[0].clone(), "this key twice"),
        (|r| r.infos[1].name = b"a".to_vec(), "two tensors of this name"),
        (|r| r.infos[0].name = Vec::new(), "an empty tensor name"),
        (|r| r.infos[0].name = vec![0xFF], "no UTF-8"),
        (|r| (r.infos[0].axes, r.infos[0].dims) = (0, vec![]), "0 axes"),
        (|r| (r.infos[0].axes, r.infos[0].dims) = (5, vec![1; 5]), "5 axes"),
        (|r| r.infos[0].dims = vec![0], "an axis of length 0"),
        (|r| r.infos[0].kind = 4, "tensor type number 4 is not supported"),
        (|r| r.infos[0].kind = 2, "a multiple of 32"),
        (|r| r.infos[0].dims = vec![16], "overlaps the tensor before"),
        (|r| r.infos[1].offset = 0, "overlaps the tensor before"),
        (|r| r.infos[1].offset = 64, "a hole before"),
        (|r| r.infos[1].offset = 33, "a hole before"),
        (|r| r.data = 63, "the end of the file at byte"),
        (|r| r.data = 65, "1 bytes that belong to no tensor"),
    ];
    for (i, (change, wanted)) in changes.into_iter().enumerate() {
        let message = Raw::refused(change);
        assert!(message.contains(wanted), "change {i}: {message}");
    }
    let values = [
        (value(b"k", 13, vec![0; 8]), "value type 13"),
        (value(b"k", u32::MAX, vec![0; 8]), "value type"),
        (value(b"k", 7, vec![2]), "a bool of 2"),
        (value(b"k", 8, text(&[0xC3])), "no UTF-8"),
        (value(&[0xC3], 0, vec![1]), "no UTF-8"),
        (value(b"k", 9, list(9, 1, &list(0, 0, &[]))), "a list of lists"),
        (value(b"k", 9, list(13, 1, &[0])), "value type 13"),
        (value(b"k", 9, list(0, u64::MAX, &[])), "more than the limit"),
        (value(b"k", 9, list(8, 1 << 25, &[])), "bytes left in the file"),
        (alignment(0), "a whole number from 8"),
        (alignment(4), "a whole number from 8"),
        (alignment(48), "a power of two"),
        (alignment(1 << 31), "a whole number from 8"),
        (value(b"general.alignment", 6, 32_f32.to_le_bytes().to_vec()), "F32(32.0)"),
    ];
    for (message, wanted) in values {
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn edge_values_in_every_count_and_size() {
    let edges = [0, 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX];
    for n in edges.into_iter().flat_map(|e: u64| [e.wrapping_sub(1), e, e.wrapping_add(1)]) {
        if n != 2 {
            Raw::refused(|r| r.tensors = n);
            Raw::refused(|r| r.keys = n);
        }
        // Up to 8 numbers take the same room, padded.
        if !(1..=8).contains(&n) {
            Raw::refused(|r| r.infos[0].dims = vec![n]);
        }
        Raw::refused(|r| (r.infos[0].axes, r.infos[0].dims) = (4, vec![8, n.max(2), n, n]));
        Raw::refused(|r| r.infos[1].offset = n);
        Raw::refused(|r| r.infos[0].offset = n.max(1));
        if n as u32 > 1 {
            Raw::refused(|r| r.infos[0].axes = n as u32);
            Raw::refused(|r| r.infos[0].kind = n as u32);
        }
        // Lengths of a key, of a string and of a list that lie: what follows is then read as something else, and no other
        // length happens to fit.
        for at in [0, 13] {
            if n != 1 && n != 5 {
                Raw::refused(|r| r.pairs[1][at..at + 8].copy_from_slice(&n.to_le_bytes()));
            }
        }
        Raw::refused(|r| r.pairs[1] = pair(b"s", 9, &[&0_u32.to_le_bytes()[..], &n.max(1).to_le_bytes()].concat()));
    }
}
