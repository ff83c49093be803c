"""All of RLHF on one page: SFT, a reward model, PPO and DPO in a language of twenty words whose true reward is known.
`gold` is the true reward. It labels pairs of answers, with noise, and judges at the end. Nothing is trained on it.
Every policy is to maximise  J = E[score] - beta KL(policy || SFT policy), where a reward model gives the score.
Left out, but in the lessons: prompts of many lengths, a cache for sampling, clipped gradients, checks.
`python micro.py 0` takes about a minute; 0 is the seed. On another machine the numbers differ a little:
    policy       gold  score     KL   share  an answer
    SFT         -0.10  -0.02    0.0     -2%  film : cast was not good
    DPO          1.13   0.99    2.3     41%  film : cast was very great
    PPO          1.41   1.46    2.0     95%  film : music was very great
    PPO, no KL   0.16   1.89   19.2   -289%  film : end was very great , cake great
share: of the largest possible J. Without the KL, PPO finds answers that the reward model never saw and overrates."""
import copy
import random
import sys

import torch

# ---- 1. a language, and its true reward --------------------------------------------------------------
THINGS = {"film": ["plot", "cast", "music", "end"], "meal": ["soup", "bread", "wine", "cake"]}
ADVERBS = {"": 1.0, "very ": 1.5, "not ": -0.5}
ADJECTIVES = {"great": 1.0, "good": 0.5, "dull": -0.5, "awful": -1.0}
OPINIONS = {f"was {adverb}{adjective}": x * y for adverb, x in ADVERBS.items() for adjective, y in ADJECTIVES.items()}
WORDS = "film meal : plot cast music end soup bread wine cake was very not great good dull awful , .".split()
PROMPTS = torch.tensor([[0, 2], [1, 2]])  # "film :" and "meal :"                             (2, P)
P, R, V, C = 2, 12, len(WORDS), 32  # words of a prompt, of an answer, of the language; channels. B answers, T = P + R

def gold(text):
    """Points for praise. A clause that is broken, off the subject or a repetition costs one."""
    subject, answer = text.split(" :", 1)
    points, things = 0.0, set(THINGS[subject])
    for clause in answer.split(","):
        thing, _, opinion = clause.strip().partition(" ")
        points += OPINIONS[opinion] if thing in things and opinion in OPINIONS else -1.0
        things.discard(thing)
    return points
# ---- 2. a small GPT ----------------------------------------------------------------------------------
class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(V, C), torch.nn.Embedding(P + R, C)
        block = torch.nn.TransformerEncoderLayer(C, 4, 4 * C, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = torch.nn.TransformerEncoder(block, 2, norm=torch.nn.LayerNorm(C), enable_nested_tensor=False)
        self.head = torch.nn.Linear(C, V)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[:ids.shape[1]]                                    # (B, T, C)
        causal = torch.nn.Transformer.generate_square_subsequent_mask(ids.shape[1])  # no word sees a later one
        return self.head(self.blocks(x, mask=causal, is_causal=True))                         # (B, T, V)
# ---- 3. sample answers, and tell how likely they are -------------------------------------------------
@torch.no_grad()
def generate(policy, ids):
    for _ in range(R):
        probs = policy(ids)[:, -1].softmax(dim=1)                                             # (B, V)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], dim=1)
    return ids                                                                                # (B, T)

def answer_mask(ids):
    is_end = ids[:, P:] == WORDS.index(".")  # an answer ends with its first full stop: the rest is never looked at
    return is_end.cumsum(dim=1) - is_end.long() == 0                                          # (B, R)

def response_logprobs(policy, ids):
    logp = policy(ids)[:, P - 1:-1].log_softmax(dim=2)  # column t predicts word t + 1
    logp = logp.gather(2, ids[:, P:, None])[:, :, 0]
    return torch.where(answer_mask(ids), logp, 0.0)                                           # (B, R)
# ---- 4. SFT: imitate mediocre demonstrations ---------------------------------------------------------
def make_demonstration():
    subject = random.choice(list(THINGS))
    things = random.sample(THINGS[subject], random.choice([1, 2]))
    answer = " , ".join(f"{thing} {random.choice(list(OPINIONS))}" for thing in things)
    text = f"{subject} : {answer}" + " ." * R  # more full stops than needed, cut to one length
    return [WORDS.index(word) for word in text.split()][:P + R]

def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def train_sft(policy, ids, steps):
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for rows in torch.randint(len(ids), (steps, 64)):  # the rows of a minibatch, (b,)
        update(optimizer, -response_logprobs(policy, ids[rows])[answer_mask(ids[rows])].mean())
# ---- 5. labels: the better of two answers wins more often (Bradley and Terry 1952) -------------------
def decode(ids):
    return [" ".join(WORDS[i] for i in row).partition(" .")[0] for row in ids.tolist()]

def label_pairs(policy, n):
    prompts = PROMPTS[torch.randint(2, (n,))]                                                 # (n, P)
    first, second = generate(policy, prompts), generate(policy, prompts)                      # (n, T) each
    gains = torch.tensor([gold(a) - gold(b) for a, b in zip(decode(first), decode(second))])  # (n,)
    first_wins = (torch.rand(n) < torch.sigmoid(gains))[:, None]                              # (n, 1)
    return torch.where(first_wins, first, second), torch.where(first_wins, second, first)     # chosen, rejected
# ---- 6. a reward model: the same network with one output ---------------------------------------------
def get_scores(reward_model, ids):
    last = P + answer_mask(ids).sum(dim=1) - 1  # only here all of the answer has been read
    return reward_model(ids)[torch.arange(len(ids)), last, 0]                                 # (B,)

def bradley_terry_loss(r_chosen, r_rejected):
    return -torch.nn.functional.logsigmoid(r_chosen - r_rejected).mean()

def train_reward_model(reward_model, chosen, rejected, steps):
    optimizer = torch.optim.Adam(reward_model.parameters(), lr=1e-3)
    for rows in torch.randint(len(chosen), (steps, 64)):
        r_chosen, r_rejected = get_scores(reward_model, chosen[rows]), get_scores(reward_model, rejected[rows])
        update(optimizer, bradley_terry_loss(r_chosen, r_rejected))
# ---- 7. PPO: sample, score, make the words more likely that did better than expected -----------------
def token_rewards(scores, logp, ref_logp, mask, beta):
    rewards = torch.where(mask, -beta * (logp - ref_logp), 0.0)  # each word pays for moving away from the reference
    rewards[torch.arange(len(mask)), mask.sum(dim=1) - 1] += scores
    return rewards                                                                            # (B, R)

def gae(rewards, values, mask, gamma=1.0, lam=0.95):  # credit for each word (Schulman et al. 2016, equation 16)
    values = torch.where(mask, values, 0.0)  # after the end there is nothing to expect
    advantages = torch.zeros_like(values)
    next_value, next_advantage = 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # a pleasant surprise?       (B,)
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values  # and the returns, the critic's targets             (B, R) each

def whiten(x, mask):  # mean 0 and variance 1: one learning rate then fits the whole training
    mean, variance = x[mask].mean(), x[mask].var(correction=0)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)

def policy_loss(logp, old_logp, advantages, mask, clip=0.2):  # (Schulman et al. 2017, equation 7)
    ratio = torch.exp(logp - old_logp)                                                        # (b, R)
    clipped = ratio.clamp(1 - clip, 1 + clip)  # nothing is gained further away
    return -torch.minimum(advantages * ratio, advantages * clipped)[mask].mean()

def value_loss(values, old_values, returns, mask, clip=0.2):
    clipped = old_values + (values - old_values).clamp(-clip, clip)                           # (b, R)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)[mask].mean()

def train_ppo(policy, reference, reward_model, beta, iterations, B=256):
    critic = copy.deepcopy(reward_model)  # it guesses the score to come
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-3)
    for _ in range(iterations):
        ids = generate(policy, PROMPTS[torch.randint(2, (B,))])                               # (B, T)
        mask = answer_mask(ids)                                                               # (B, R)
        with torch.no_grad():
            old_logp, ref_logp = response_logprobs(policy, ids), response_logprobs(reference, ids)
            old_values = critic(ids)[:, P - 1:-1, 0]  # expected before a word is read          (B, R)
            rewards = token_rewards(get_scores(reward_model, ids), old_logp, ref_logp, mask, beta)
        advantages, returns = gae(rewards, old_values, mask)
        advantages = whiten(advantages, mask)
        for rows in torch.randint(B, (8, 64)):  # 8 minibatches
            logp = response_logprobs(policy, ids[rows])                                       # (b, R)
            values = critic(ids[rows])[:, P - 1:-1, 0]
            pg_loss = policy_loss(logp, old_logp[rows], advantages[rows], mask[rows])
            update(optimizer, pg_loss + value_loss(values, old_values[rows], returns[rows], mask[rows]))
# ---- 8. DPO: a policy is a reward model too, with the score beta log pi/reference --------------------
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):  # (Rafailov et al. 2023, equation 7)
    return bradley_terry_loss(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))

def train_dpo(policy, reference, chosen, rejected, beta, steps):
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-4)
    for rows in torch.randint(len(chosen), (steps, 64)):
        logp = [response_logprobs(policy, ids[rows]).sum(dim=1) for ids in (chosen, rejected)]      # (b,) each
        ref_logp = [response_logprobs(reference, ids[rows]).sum(dim=1).detach() for ids in (chosen, rejected)]
        update(optimizer, dpo_loss(*logp, *ref_logp, beta))
# ---- 9. the best there is, and the table -------------------------------------------------------------
def optimum(scores, beta):  # the best policy is reference * exp(score / beta), so samples of the reference tell its J
    return beta * (scores.double() / beta).exp().mean().log().item()

def main(seed=0, steps=300, pairs=4000, iterations=40, samples=1500, beta=0.25):
    random.seed(seed)
    torch.manual_seed(seed)
    print("first SFT, labels and a reward model ...\npolicy       gold  score     KL   share  an answer", flush=True)
    sft = GPT()
    train_sft(sft, torch.tensor([make_demonstration() for _ in range(1000)]), steps)
    reward_model = copy.deepcopy(sft)
    reward_model.head = torch.nn.Linear(C, 1)
    chosen, rejected = label_pairs(sft, pairs)
    train_reward_model(reward_model, chosen, rejected, steps)
    prompts = PROMPTS.repeat(samples, 1)                                                      # (2 samples, P)
    scores = get_scores(reward_model, generate(sft, prompts)).detach()                        # (2 samples,)
    zero = scores.mean()  # only differences mean anything, so we count from the SFT policy's mean
    best = sum(optimum(s - zero, beta) for s in scores.view(samples, 2).T) / 2  # of both prompts
    for name in ("SFT", "DPO", "PPO", "PPO, no KL"):
        policy = copy.deepcopy(sft)
        if name == "DPO":
            train_dpo(policy, sft, chosen, rejected, beta, steps // 2)
        if name in ("PPO", "PPO, no KL"):
            train_ppo(policy, sft, reward_model, beta if name == "PPO" else 0.0, iterations)
        ids = generate(policy, prompts)                                                       # (2 samples, T)
        texts = decode(ids)
        mean_gold = sum(gold(text) for text in texts) / len(texts)
        score = (get_scores(reward_model, ids).mean() - zero).item()
        kl = (response_logprobs(policy, ids) - response_logprobs(sft, ids)).sum(dim=1).mean().item()
        share = round(100 * (score - beta * kl) / best)
        print(f"{name:10}  {mean_gold:5.2f}  {score:5.2f}  {kl:5.1f}  {share:5}%  {texts[0]}", flush=True)

if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small: more threads wait for each other
    seed = " ".join(sys.argv[1:]) or "0"
    if not seed.isdecimal() or len(seed) > 9:
        print("usage: python micro.py [SEED], a number of at most nine digits", file=sys.stderr)
        sys.exit(2)
    main(int(seed))
