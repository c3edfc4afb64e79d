//! Puts the model in `assets/embedded` (or in the Hugging Face directory that `LACUNA_EMBEDDED_DIR` names while building)
//! into the library. Without the folder the library has no model of its own.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=LACUNA_EMBEDDED_DIR");
    let own = || Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap_or_default()).join("assets").join("embedded");
    let dir: PathBuf = env::var_os("LACUNA_EMBEDDED_DIR").map_or_else(own, Into::into);
    println!("cargo::rerun-if-changed={}", dir.display());
    let dir = dir.canonicalize().unwrap_or(dir);
    let mut files = Vec::new();
    if dir.is_dir() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json" || e == "safetensors" || e == "jinja") {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut list = String::from("&[\n");
    for path in files {
        let name = path.file_name().unwrap_or_default();
        list += &format!("({name:?}, include_bytes!({path:?}) as &[u8]),\n");
    }
    list += "]\n";
    fs::write(Path::new(&env::var("OUT_DIR").unwrap_or_default()).join("embedded.rs"), list)
}
