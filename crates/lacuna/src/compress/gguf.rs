//! A GGUF file of a Hugging Face model: the compressed directory, which is then written as a file and removed.

use super::{
    Progress, Report, Request, lock,
    output::{Unfinished, check_place, lock_beside},
    store::beside,
    tensors::Target,
};
use crate::{
    error::{Error, Result},
    model::export::Export,
};
use lacuna_core::{atomic::write_atomically, map::read_small};

/// Compresses the Hugging Face model of `request` into a GGUF file by `directory`, which makes a directory of a request.
///
/// # Errors
/// Before any work: what [`Export::new`] refuses. Later: those of `directory`.
pub fn compress(
    request: &Request,
    progress: &mut dyn FnMut(Progress<'_>),
    directory: impl FnOnce(&Request, &mut dyn FnMut(Progress<'_>)) -> Result<Report>,
) -> Result<Report> {
    check_place(&request.model, &request.output, Target::Gguf)?;
    drop(Export::new(&request.model)?);
    let folder = Unfinished(beside(&request.output, "lacuna-hf")?);
    let mut report = directory(&Request { output: folder.0.clone(), ..request.clone() }, progress)?;
    let export = Export::new(&folder.0)?;
    export.write(&request.output)?;
    report.bytes.1 = export.bytes();
    report.notes.extend(export.notes().iter().cloned());
    if report.layers.iter().any(|l| l.dropped > 0) {
        report.notes.push(
            "every type in this file holds zeros exactly; Q4_K and the other types with a minimum do not, so quantising the file \
             further would lose them"
                .into(),
        );
    }
    let lock = read_small(folder.0.join(lock::NAME), lock::LOCK_BYTES)?;
    write_atomically(lock_beside(&request.output), Some(lock.len() as u64), |out| out.write_all(&lock))?;
    Ok(report)
}

/// Writes the Hugging Face model `model` as a GGUF file with the numbers that it has; gives the bytes of its tensors and what
/// a user should know.
///
/// # Errors
/// As [`Export::new`]; an output that is there already, or whose name does not end in .gguf.
pub fn convert(model: &std::path::Path, output: &std::path::Path) -> Result<(u64, Vec<String>)> {
    let wrong = |problem: String| Err(Error::Argument { name: "output", problem });
    if !model.is_dir() {
        return wrong(format!(
            "{} is a file already; a Hugging Face directory can be written as GGUF",
            model.display()
        ));
    }
    if !output.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        return wrong(format!("{}: end the name of a GGUF file in .gguf", output.display()));
    }
    if output.exists() {
        return wrong(format!("{} is there already; remove it, or choose another place", output.display()));
    }
    let export = Export::new(model)?;
    export.write(output)?;
    Ok((export.bytes(), export.notes().to_vec()))
}
