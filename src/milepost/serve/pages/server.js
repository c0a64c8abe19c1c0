// Asking the server: JSON there and back, and one kind of error for all that goes wrong.

/** An answer that is no success; status 0 where there was none. */
export class Refused extends Error {
  constructor(status, answer) {
    super(answer.error ?? `the server answered ${status}`);
    this.status = status;
    this.hint = answer.hint ?? "";
    this.scores = answer.scores;
  }
}

/**
 * One question.
 * @param body what to send; without it the question is a GET.
 * @throws {Refused}
 */
export async function ask(address, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Refused(0, {
      error: "the server does not answer",
      hint: "see whether milepost rate still runs, and start it again where it does not",
    });
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, answer);
  return answer;
}

/** Where a presentation lies. */
export const addressOf = (key) => `/api/presentations/${encodeURIComponent(key)}`;
