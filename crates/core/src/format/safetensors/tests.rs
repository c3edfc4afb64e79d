use super::*;

fn bytes_of(tensors: &[NewTensor<'_>], metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    write(tensors, metadata, &mut out).unwrap();
    assert_eq!(file_size(tensors, metadata).unwrap(), out.len() as u64);
    out
}

fn sample() -> Vec<u8> {
    let data: Vec<u8> = (0..100).collect();
    let tensors = [
        NewTensor { name: "b.weight", dtype: Dtype::F32, shape: &[2, 3], data: &data[..24] },
        NewTensor { name: "a", dtype: Dtype::BF16, shape: &[5], data: &data[24..34] },
        NewTensor { name: "empty", dtype: Dtype::F16, shape: &[0, 4], data: &[] },
        NewTensor { name: "ids", dtype: Dtype::I64, shape: &[], data: &data[40..48] },
    ];
    bytes_of(&tensors, &[("format", "pt")])
}

/// A file with this header and so many bytes of data.
fn file(header: &str, data: usize) -> Bytes {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes.into()
}

fn refused(header: &str, data: usize) -> String {
    match Tensors::parse(file(header, data)) {
        Ok(t) => panic!("accepted {header}: {t:?}"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn what_is_written_is_read_back() {
    let t = Tensors::parse(sample().into()).unwrap();
    let names: Vec<_> = t.entries().iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["a", "b.weight", "empty", "ids"]);
    assert_eq!(t.metadata()["format"], "pt");
    let b = t.get("b.weight").unwrap();
    assert_eq!((b.dtype, b.matrix_shape().unwrap(), b.range.start % 8), (Dtype::F32, (2, 3), 0));
    assert_eq!(*t.bytes(b).unwrap(), *(0..24).collect::<Vec<u8>>());
    let e = t.get("ids").unwrap().format().unwrap_err().to_string();
    assert!(e.starts_with("`ids`: type I64 as a weight is not supported."), "{e}");
    assert!(t.get("ids").unwrap().matrix_shape().is_err() && t.get("zzz").is_none());
}

#[test]
fn every_cut_is_an_error_with_a_byte() {
    let bytes = Bytes::from(sample());
    for length in 0..bytes.len() {
        let e = Tensors::parse(bytes.slice(0..length).unwrap()).unwrap_err();
        assert!(e.place().is_some_and(|p| p.byte.is_some()), "cut at {length}: {e}");
    }
}

#[test]
fn handcrafted_bad_files() {
    let t = |body: &str| format!("{{\"t\":{body}}}");
    let kinds = [
        ("[]".to_owned(), 0, "`{` as the first"),
        (" {}".to_owned(), 0, "`{` as the first"),
        ("{}".to_owned(), 1, "belong to no tensor"),
        ("{]".to_owned(), 0, "safetensors JSON"),
        ("{\"t\":1}".to_owned(), 0, "safetensors JSON"),
        (t("{}"), 0, "`data_offsets` is missing"),
        (t(r#"{"dtype":"F32","data_offsets":[0,4]}"#), 4, "`shape` is missing"),
        (t(r#"{"shape":[1],"data_offsets":[0,4]}"#), 4, "`dtype` is missing"),
        (t(r#"{"dtype":"F33","shape":[1],"data_offsets":[0,4]}"#), 4, "unknown dtype `F33`"),
        (t(r#"{"dtype":7,"shape":[1],"data_offsets":[0,4]}"#), 4, "expected a string"),
        (t(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#), 4, "invalid value"),
        (t(r#"{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}"#), 4, "invalid type"),
        (t(r#"{"dtype":"F32","shape":1,"data_offsets":[0,4]}"#), 4, "invalid type"),
        (t(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}"#), 4, "more than 8 numbers"),
        (t(r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#), 4, "needs two numbers"),
        (t(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#), 4, "more than 2 numbers"),
        (t(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#), 4, "does not fit"),
        (t(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#), 4, "expected 8 for F32 [2]"),
        (t(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,8]}"#), 8, "expected 4 for F32 [1]"),
        (t(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#), 4, "the end of the file"),
        (t(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), 8, "a hole before"),
        (t(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), 5, "1 bytes that belong to no tensor"),
        (t(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,2]}"#), 2, "in units of 8"),
        (t(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#), 0, "does not fit"),
        (t(r#"{"dtype":"F32","shape":[2199023255552],"data_offsets":[0,0]}"#), 0, "more than the limit"),
        (
            t(r#"{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,18446744073709551616]}"#),
            1,
            "invalid type",
        ),
        (
            t(r#"{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}"#),
            1,
            "does not fit",
        ),
        (t(r#"{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), 4, "`dtype` twice"),
        (format!(r#"{{"t":{0},"t":{0}}}"#, r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#), 0, "two tensors"),
        (
            format!(r#"{{"t":{0},"u":{0}}}"#, r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#),
            4,
            "overlaps the tensor before",
        ),
        (r#"{"__metadata__":{"a":1}}"#.to_owned(), 0, "expected a string"),
        (r#"{"__metadata__":{"a":"1","a":"2"}}"#.to_owned(), 0, "metadata key twice"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(), 0, "`__metadata__` twice"),
        (t(&format!("{{\"x\":{}", "[".repeat(100_000))), 0, "expected value"),
        ("{\"t\u{0}\":1}".to_owned(), 0, "safetensors JSON"),
    ];
    assert!(kinds.len() > 30);
    for (header, data, wanted) in kinds {
        let message = refused(&header, data);
        assert!(message.contains(wanted), "{}: {message}", &header[..header.len().min(100)]);
        assert!(message.len() < 700, "{message}");
    }
    let mut text = file("{\"tt\":1}", 0).to_vec();
    text[10] = 0xFF;
    assert!(Tensors::parse(text.into()).is_err(), "a name that is no UTF-8");
}

#[test]
fn lengths_around_every_power() {
    let edges = [0, 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX].into_iter();
    for length in edges.flat_map(|e: u64| [e.wrapping_sub(1), e, e.wrapping_add(1)]) {
        let mut bytes = sample();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert!(Tensors::parse(bytes.into()).is_err(), "{length}");
    }
}

#[test]
fn large_headers_are_refused_or_read_fast() {
    let start = std::time::Instant::now();
    let mut bytes = (cap::HEADER + 1).to_le_bytes().to_vec();
    bytes.resize(8 + cap::HEADER as usize + 1, b'{');
    assert!(matches!(Tensors::parse(bytes.into()), Err(Error::Limit { .. })));
    // A shape of fifty million numbers.
    let mut bomb = cap::HEADER.to_le_bytes().to_vec();
    bomb.extend(br#"{"t":{"shape":["#);
    bomb.resize(8 + cap::HEADER as usize, b'1');
    bomb[23..].chunks_exact_mut(2).for_each(|c| c[1] = b',');
    assert!(Tensors::parse(bomb.into()).is_err());
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
}

#[test]
fn shard_names_must_be_plain() {
    let index = |shard: &str| format!(r#"{{"metadata":{{}},"weight_map":{{"w":"{shard}"}}}}"#);
    assert_eq!(shard_names(index("model-00001-of-00002.safetensors").as_bytes()).unwrap().len(), 1);
    for bad in [
        "../x.safetensors",
        "/x.safetensors",
        "a/b.safetensors",
        "x.bin",
        "",
        "..",
        ".safetensors",
        "C:x.safetensors",
        "a\\\\b.safetensors",
    ] {
        let e = shard_names(index(bad).as_bytes()).unwrap_err().to_string();
        assert!(e.contains("a plain file name"), "{bad}: {e}");
    }
    for bad in ["{}", r#"{"weight_map":[]}"#, r#"{"weight_map":{"w":1}}"#, "x"] {
        assert!(shard_names(bad.as_bytes()).is_err());
    }
}

#[test]
fn sharded_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let one = |name| bytes_of(&[NewTensor { name, dtype: Dtype::F32, shape: &[1], data: &[0, 0, 128, 63] }], &[]);
    let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    let message = || Model::open(dir.path(), crate::map::LoadMode::Map).unwrap_err().to_string();
    assert!(message().contains("`model.safetensors` or `model.safetensors.index.json` is missing"));
    put("model.safetensors.index.json", br#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#);
    put("1.safetensors", &one("a"));
    assert!(message().contains("shard `2.safetensors` is missing"), "{}", message());
    put("2.safetensors", &one("c"));
    assert!(message().contains("2.safetensors: `b`: this tensor of the index is missing"), "{}", message());
    put("2.safetensors", &one("b"));
    let model = Model::open(dir.path(), crate::map::LoadMode::Read).unwrap();
    assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(*model.require("b").unwrap().1, [0, 0, 128, 63]);
    assert!(model.require("c").unwrap_err().to_string().starts_with("`c`: this tensor is missing."));
    let split = model.hash(b"config");
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    let both = [("b", 4), ("a", 0)].map(|(name, _)| NewTensor {
        name,
        dtype: Dtype::F32,
        shape: &[1],
        data: &[0, 0, 128, 63],
    });
    put("model-00001-of-00002.safetensors", &bytes_of(&both, &[]));
    assert!(message().contains("is missing"), "several files, and which is the model nobody says");
    for name in ["1.safetensors", "2.safetensors"] {
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    assert!(message().contains("is missing"), "a shard alone");
    std::fs::rename(dir.path().join("model-00001-of-00002.safetensors"), dir.path().join("only.safetensors")).unwrap();
    assert_eq!(Model::open(dir.path(), crate::map::LoadMode::Map).unwrap().hash(b"config"), split);
    put("model.safetensors", &bytes_of(&both, &[]));
    let single = Model::open(dir.path(), crate::map::LoadMode::Map).unwrap();
    assert_eq!(single.hash(b"config"), split, "the split into shards does not matter");
    let twice = vec![Tensors::parse(one("a").into()).unwrap(), Tensors::parse(one("a").into()).unwrap()];
    assert!(Model::from_files(twice).unwrap_err().to_string().contains("two shards"));
}
