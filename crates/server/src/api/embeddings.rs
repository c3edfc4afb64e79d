//! `POST /v1/embeddings`.

use super::{Arrival, State, aside, prepare::tokens};
use crate::{
    base64,
    error::{Error, Result},
    fields::Endpoint,
    http::{Reply, Request, StatusCode},
    schedule::{Event, Job, Pooling, Task},
};
use serde_json::{Value, json};
use std::sync::{Arc, atomic::Ordering};

/// Answers a request.
pub(super) async fn answer(state: Arc<State>, request: Request) -> Result<Reply> {
    let arrival = Arrival::new();
    state.has_room()?;
    let reader = state.clone();
    let (plan, base64, pooling, prompts) = aside(move || {
        let mut values = reader.read(Endpoint::Embeddings, &request.body)?;
        let plan = reader.plan(&values)?;
        let pooling = if values.text("pooling") == Some("last") { Pooling::Last } else { Pooling::Mean };
        let prompts = tokens(&reader, "input", values.take_inputs("input"))?;
        Ok((plan, values.text("encoding_format") == Some("base64"), pooling, prompts))
    })
    .await?;
    let total: usize = prompts.iter().map(Vec::len).sum();
    let group = state.ids.fetch_add(1, Ordering::Relaxed);
    let mut vectors: Vec<Value> = vec![Value::Null; prompts.len()];
    let mut running = state.submit(|events| {
        let job = |(index, prompt): (usize, Vec<u32>)| Job {
            plan,
            prompt: prompt.into(),
            task: Task::Embed(pooling),
            index,
            group,
            since: arrival.at,
            events: events.clone(),
        };
        prompts.into_iter().enumerate().map(job).collect()
    })?;
    while let Some((index, event)) = running.next().await {
        match event {
            Event::Vector(vector) => vectors[index] = shape(vector, base64),
            Event::Failed(_) => {
                state.metrics.failed.add(1);
                return Err(Error::internal("the vector could not be computed"));
            }
            _ => {}
        }
    }
    running.check()?;
    let data = vectors.into_iter().enumerate();
    let data = data.map(|(i, v)| json!({ "object": "embedding", "index": i, "embedding": v }));
    let body = json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "model": state.names[plan],
        "usage": { "prompt_tokens": total, "total_tokens": total },
    });
    Ok(Reply::json(StatusCode::OK, body.to_string()))
}

/// The vector scaled to length 1, in the form that was asked for.
fn shape(mut vector: Vec<f32>, base64: bool) -> Value {
    let length = vector.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
    }
    match base64 {
        true => Value::from(base64::encode(&vector.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())),
        false => Value::from(vector),
    }
}
