#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| lacuna::fuzz::gguf_tokenizer(input));
