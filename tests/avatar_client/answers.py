"""What an endpoint is asked and what it answers, for the tests that script one."""

IMAGE, AUDIO = "https://example.com/portrait.png", "https://example.com/speech.wav"
RUN, STATUS, CANCEL = (
    "POST /v2/local/run",
    "GET /v2/local/status/job-1",
    "POST /v2/local/cancel/job-1",
)
QUEUED = {"id": "job-1", "status": "IN_QUEUE"}
PROGRESS = {
    "stage": "denoise",
    "stage_index": 3,
    "stage_count": 5,
    "progress": 0.42,
    "step": 21,
    "total_steps": 50,
    "elapsed_seconds": 171.2,
    "eta_seconds": 236.0,
    "message": "Denoising 21/50",
}
RUNNING = {"id": "job-1", "status": "IN_PROGRESS", "delayTime": 1500, "output": PROGRESS}
DONE = {"id": "job-1", "status": "COMPLETED", "executionTime": 2500, "output": {"seed": 7}}
SECRET_URL = "https://store.example.com/a.mp4?X-Amz-Signature=0123secret"
