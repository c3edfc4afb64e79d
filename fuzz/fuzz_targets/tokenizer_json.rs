#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| lacuna::fuzz::tokenizer_json(input));
