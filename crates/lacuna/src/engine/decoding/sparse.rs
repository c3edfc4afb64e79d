//! Guesses by the model itself, sparse: some steps by the session's plan.

use super::{Ask, Draft};
use crate::{
    engine::{session::Session, tree::TokenTree},
    error::Result,
};

/// Writes a chain of tokens by the session's plan. The last one is not run; the checking pass overwrites the keys and
/// values of the others.
#[derive(Clone, Copy, Debug, Default)]
pub struct SparseSteps;

impl Draft for SparseSteps {
    fn draft(&mut self, session: &mut Session, last: u32, ask: &Ask<'_>) -> Result<TokenTree> {
        let start = session.len();
        let mut tokens = vec![last];
        let wrote = write(session, &mut tokens, ask);
        session.truncate(start);
        wrote.map(|()| TokenTree::chain(&tokens))
    }
}

fn write(session: &mut Session, tokens: &mut Vec<u32>, ask: &Ask<'_>) -> Result<()> {
    // The same random numbers as the real choice: a sparse model that is close draws the same tokens.
    let mut sampler = ask.sampler.clone();
    while tokens.len() < ask.most.min(ask.deep) {
        let last = tokens[tokens.len() - 1];
        if (ask.ends)(last) {
            break;
        }
        let id = sampler.sample(session.decode(last)?);
        sampler.accept(id);
        tokens.push(id);
    }
    Ok(())
}
